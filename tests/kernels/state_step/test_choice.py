"""Errors of a step of CEMA."""

from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.common.target import Target, find_target, interpreted
from pallas_kernels.state_step import CemaStepTables, api, state_step


def step(x=(2, 128), table=(4, 128), state=(2, 8, 128), x_dtype=jnp.float32,
         table_dtype=jnp.float32, state_dtype=jnp.float32, implementation=None):  # fmt: skip
    tables = CemaStepTables(*[jnp.zeros(table, table_dtype)] * 5, jnp.zeros(128, table_dtype))
    x, state = jnp.zeros(x, x_dtype), jnp.zeros(state, state_dtype)
    return jax.eval_shape(lambda: state_step(x, tables, state, implementation=implementation))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (2, 1, 128)}, r"x is float32\(2, 1, 128\); needs"),
        ({"x_dtype": jnp.int32}, r"x is int32\(2, 128\); needs"),
        ({"table": (4, 64)}, r"tables.q_re is float32\(4, 64\); x \(2, 128\)"),
        ({"table_dtype": jnp.bfloat16}, r"tables.q_re is bfloat16\(4, 128\)"),
        ({"state": (1, 8, 128)}, r"needs float32\(S, 8, 128\) with S >= 2: use pack_state"),
        ({"state": (2, 4, 128)}, r"state is float32\(2, 4, 128\); needs float32\(S, 8, 128\)"),
        ({"state_dtype": jnp.bfloat16}, r"state is bfloat16\(2, 8, 128\)"),
        ({"implementation": "cuda"}, "state_step has no implementation 'cuda'"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        step(**arguments)


H200, A100 = Target("gpu", "NVIDIA H200"), Target("gpu", "NVIDIA A100-SXM4-80GB")
BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    ("target", "channels", "order", "dtype", "table_dtype", "choice"),
    [
        (H200, 1024, 16, BF16, F32, "mosaic_gpu"),
        (H200, 128, 1, BF16, F32, "mosaic_gpu"),
        (H200, 1024, 16, F32, F32, "xla"),
        (H200, 1024, 16, BF16, jnp.float64, "xla"),
        (H200, 1000, 16, BF16, F32, "xla"),
        (H200, 1024, 32, BF16, F32, "xla"),
        (A100, 1024, 16, BF16, F32, "xla"),
        (Target("cpu", "cpu"), 1024, 16, BF16, F32, "xla"),
        (Target("tpu", "TPU v5p"), 1024, 16, BF16, F32, "xla"),
    ],
)
def test_choice(target, channels, order, dtype, table_dtype, choice, monkeypatch):
    monkeypatch.setattr(api, "find_target", lambda: target)
    table = jax.ShapeDtypeStruct((order, channels), table_dtype)
    tables = CemaStepTables(*[table] * 5, jax.ShapeDtypeStruct((channels,), table_dtype))
    x = jax.ShapeDtypeStruct((2, channels), dtype)
    assert api._choose_implementation(x, tables) == choice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "state_step: mosaic_gpu takes bfloat16 x and float32 tables, these are float32"),
        (
            {"x_dtype": BF16, "table": (17, 128), "state": (2, 34, 128)},
            "keeps up to 16 orders in registers, tables have 17",
        ),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_by_name(arguments, message):
    with interpreted(), pytest.raises(ValueError, match=message):
        step(**arguments, implementation="mosaic_gpu")


def test_the_kernel_is_refused_elsewhere():
    if find_target().is_hopper:
        pytest.skip("is about other devices")
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper GPU, this is"):
        step(x_dtype=BF16, implementation="mosaic_gpu")


def test_implementations_have_the_common_names():
    assert set(api.IMPLEMENTATIONS) <= set(get_args(Implementation))
