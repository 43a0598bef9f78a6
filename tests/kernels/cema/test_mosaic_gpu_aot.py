"""The CUDA compiler accepts CEMA's kernels for an H200 without spilling; no GPU is needed."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.common.devices import HOPPER
from tests.topologies import compile_for, h200_device, ptxas_usage

KERNELS = {"cema_summaries", "cema_outputs", "cema_gradients"}
# Bytes stored and loaded, most of them at document boundaries; without documents there are none.
MOST_SPILLED = {"plain": 0, "packed": 640}


def compile_gradient(packed: bool, implementation: str | None = None):
    rows, length, channels, order = 1, 16_384, 4_096, 16

    def run(x, params, segment_ids, dy):
        def y(x, params):
            return cema(x, params, segment_ids=segment_ids, implementation=implementation).y

        out, pull_back = jax.vjp(y, x, params)
        return out, pull_back(dy)

    shape = jax.ShapeDtypeStruct
    matrix, vector = shape((channels, order), jnp.float32), shape((channels,), jnp.float32)
    gamma = shape((channels, order, 2), jnp.float32)
    params = CemaParams(matrix, matrix, vector, gamma, vector)
    x = shape((rows, length, channels), jnp.bfloat16)
    ids = shape((rows, length), jnp.int32) if packed else None
    return x, compile_for(h200_device(), run, x, params, ids, x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_kernels_fit_into_registers_and_little_memory(kind):
    x, compiled = compile_gradient(kind == "packed")
    usage = ptxas_usage(compiled)
    for kernel in usage:
        print(f"{kind}: {kernel.name} {kernel.registers} registers, {kernel.spill_bytes} B spilled")
    assert {kernel.name for kernel in usage} == KERNELS
    # Two warpgroups share the registers of a multiprocessor.
    assert max(kernel.registers for kernel in usage) * 256 <= HOPPER.registers
    assert sum(kernel.spill_bytes for kernel in usage) <= MOST_SPILLED[kind]
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 0.5 * x.size * x.dtype.itemsize


def test_gpu_kernels_are_refused_on_cpu():
    matrix = jnp.zeros((3, 5))
    params = CemaParams(matrix, matrix, jnp.zeros(3), jnp.zeros((3, 5, 2)), jnp.zeros(3))
    for name, device in (("mosaic_gpu", "Hopper"), ("pallas_tpu", "TPU")):
        if jax.default_backend() != "cpu":
            pytest.skip("tests the error on a CPU")
        with pytest.raises(ValueError, match=f"needs an? .*{device}.*this is cpu"):
            cema(jnp.zeros((2, 8, 3)), params, implementation=name)
