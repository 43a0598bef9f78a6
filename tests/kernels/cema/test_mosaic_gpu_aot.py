"""The CUDA compiler accepts CEMA's kernels for an H200 without spilling; no GPU is needed."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.cema import CemaParams, cema
from tests.topologies import compile_for, h200_device, ptxas_usage

# Registers that let two warpgroups share a multiprocessor; the summaries' kernel leaves room for 3.
MOST_REGISTERS = {"cema_summaries": 168, "cema_outputs": 255, "cema_gradients": 255}
# Bytes stored and loaded around borders; the loop over plain tokens has none.
MOST_SPILLED = {"plain": 0, "packed": 400}


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
    assert {kernel.name for kernel in usage} == set(MOST_REGISTERS)
    for kernel in usage:
        assert kernel.registers <= MOST_REGISTERS[kernel.name]
    assert sum(kernel.spill_bytes for kernel in usage) <= MOST_SPILLED[kind]
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= 0.5 * x.size * 2


def test_gpu_kernels_are_refused_on_cpu():
    matrix = jnp.zeros((3, 5))
    params = CemaParams(matrix, matrix, jnp.zeros(3), jnp.zeros((3, 5, 2)), jnp.zeros(3))
    for name, device in (("mosaic_gpu", "Hopper"), ("pallas_tpu", "TPU")):
        if jax.default_backend() != "cpu":
            pytest.skip("says what happens on a CPU")
        with pytest.raises(ValueError, match=f"needs an? .*{device}.*this is cpu"):
            cema(jnp.zeros((2, 8, 3)), params, implementation=name)
