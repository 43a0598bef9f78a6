"""The implementation of the row operations that is chosen by default, and errors."""

from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import rowwise
from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.common.target import Target, find_target, interpreted
from pallas_kernels.rowwise import api

H200, A100 = Target("gpu", "NVIDIA H200"), Target("gpu", "NVIDIA A100-SXM4-80GB")
BF16 = jnp.bfloat16


@pytest.mark.parametrize(
    ("target", "shape", "dtype", "choice"),
    [
        (H200, (8, 2048, 1024), BF16, "mosaic_gpu"),
        (H200, (4, 4096, 2048), BF16, "mosaic_gpu"),
        (H200, (8, 2048, 1024), jnp.float32, "xla"),
        (H200, (8, 1, 1024), BF16, "xla"),
        (H200, (8, 2048, 768), BF16, "xla"),
        (H200, (8, 2048, 1000), BF16, "xla"),
        (A100, (8, 2048, 1024), BF16, "xla"),
        (Target("cpu", "cpu"), (8, 2048, 1024), BF16, "xla"),
        (Target("tpu", "TPU v5p"), (8, 2048, 1024), BF16, "xla"),
    ],
)
def test_choice_by_device_size_and_dtype(target, shape, dtype, choice, monkeypatch):
    monkeypatch.setattr(api, "find_target", lambda: target)
    x = jax.ShapeDtypeStruct(shape, dtype)
    vector = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    choose = api._choose_implementation
    assert choose("layer_norm", (x, None), (None, vector, vector)) == choice
    assert choose("silu_gate", (x, x), (vector,)) == choice
    # Without sums over rows XLA is as fast.
    assert choose("silu_gate", (x, x), (None,)) == "xla"


def test_choice_for_rows_too_wide_for_registers(monkeypatch):
    monkeypatch.setattr(api, "find_target", lambda: H200)
    x = jax.ShapeDtypeStruct((1024, 8192), BF16)
    vector = jax.ShapeDtypeStruct((8192,), jnp.float32)
    assert api._choose_implementation("rms_norm", (x,), (vector,)) == "xla"
    assert api._choose_implementation("silu", (x,), (vector,)) == "mosaic_gpu"


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 128), jnp.float32, "rms_norm: mosaic_gpu takes bfloat16 rows, these are float32"),
        ((2, 100), BF16, "needs a width that is a multiple of 128"),
        ((0, 128), BF16, "and one row"),
        ((2, 8192), BF16, "rows of up to 4096 numbers in registers, these have 8192"),
    ],
)
def test_what_kernels_cannot_take_is_refused_by_name(shape, dtype, message):
    with interpreted(), pytest.raises(ValueError, match=message):
        rowwise.rms_norm(
            jnp.zeros(shape, dtype), None, eps=1e-5, dtype=BF16, implementation="mosaic_gpu"
        )


def test_kernels_are_refused_elsewhere():
    if find_target().is_hopper:
        pytest.skip("is about other devices")
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper or Blackwell GPU, this is"):
        rowwise.silu(jnp.zeros((2, 128), BF16), None, dtype=BF16, implementation="mosaic_gpu")


def test_errors_name_what_is_wrong():
    x = jnp.zeros((2, 128))
    for unknown in ("cuda", "pallas_tpu"):
        known = "'reference', 'xla', 'mosaic_gpu', 'triton'"
        message = f"silu has no implementation '{unknown}'; use one of {known}"
        with pytest.raises(ValueError, match=message):
            rowwise.silu(x, None, dtype=BF16, implementation=unknown)  # pyright: ignore
    with pytest.raises(ValueError, match=r"rows have shapes \(2, 128\) and \(128,\)"):
        rowwise.silu_gate(x, None, x[0], dtype=BF16)
    with pytest.raises(ValueError, match=r"a vector has shape \(3,\)"):
        rowwise.rms_norm(x, jnp.zeros(3), eps=1e-5, dtype=BF16)


def test_implementations_have_the_common_names():
    assert set(api.IMPLEMENTATIONS) <= set(get_args(Implementation))
