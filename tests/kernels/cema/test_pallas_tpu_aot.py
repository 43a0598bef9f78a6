"""The TPU compiler accepts CEMA's kernels for every generation; no TPU is needed."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.cema import CemaParams
from pallas_kernels.cema.pallas_tpu.op import cema_pallas_tpu
from tests.topologies import compile_for, tpu_device

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}


def compile_gradient(chip: str, dtype: Any, order: int, *, packed: bool) -> Any:
    rows, length, channels = 2, 4_000 if packed else 16_000, 256

    def run(x, params, state, segment_ids, cotangents):
        out, pull_back = jax.vjp(lambda *a: cema_pallas_tpu(*a, segment_ids), x, params, state)
        return out, pull_back(type(out)(*cotangents))

    shape = jax.ShapeDtypeStruct
    matrix, vector = shape((channels, order), jnp.float32), shape((channels,), jnp.float32)
    gamma = shape((channels, order, 2), jnp.float32)
    params = CemaParams(matrix, matrix, vector, gamma, vector)
    x = shape((rows, length, channels), dtype)
    state = shape((rows, channels, order), jnp.complex64)
    ids = shape((rows, length), jnp.int32) if packed else None
    return compile_for(tpu_device(TOPOLOGIES[chip]), run, x, params, state, ids, (x, state))


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles(chip):
    compiled = compile_gradient(chip, jnp.bfloat16, 16, packed=chip == "v5e")
    kernels = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
    assert any("cema_forward" in line for line in kernels)
    assert any("cema_backward" in line for line in kernels)


@pytest.mark.slow
def test_float32_and_large_orders_compile():
    assert "cema_backward" in compile_gradient("v6e", jnp.float32, 24, packed=False).as_text()


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="N can be up to 16"):
        compile_gradient("v4", jnp.bfloat16, 17, packed=False)
