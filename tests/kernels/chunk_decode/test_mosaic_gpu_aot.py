"""The CUDA compiler accepts chunk decoding for an H200 without spilling; no GPU is needed."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_attention.types import Int8Slots
from pallas_kernels.chunk_decode.block_sizes import THREADS, choose_tiling
from pallas_kernels.chunk_decode.mosaic_gpu import op as mosaic_gpu
from tests.kernels.chunk_decode.definition import shared_shapes
from tests.topologies import compile_for, h200_device, ptxas_usage

SLOW = pytest.mark.slow
HOPPER_REGISTERS = 65536  # of a multiprocessor


def as_int8(slots):
    scale = jax.ShapeDtypeStruct(slots.shape[:3], jnp.float32)
    return Int8Slots(jax.ShapeDtypeStruct(slots.shape, jnp.int8), scale)


@pytest.mark.parametrize(
    ("rows", "heads", "slots", "dk", "dv", "kv", "eps", "blocks"),
    [
        # Few blocks, whose keys are loaded ahead.
        pytest.param(1, 1, 2048, 256, 2048, "model", 1e-5, 2, marks=SLOW),
        pytest.param(8, 1, 2048, 256, 2048, "model", 1e-5, 3, marks=SLOW),
        (64, 1, 2048, 256, 2048, "model", 1e-5, 3),
        pytest.param(8, 4, 4096, 256, 2048, "model", "queries and keys", 3, marks=SLOW),
        pytest.param(1, 1, 2048, 256, 2048, "int8", 1e-5, 3, marks=SLOW),
        (64, 1, 2048, 256, 2048, "int8", 1e-5, 4),
        pytest.param(8, 4, 2048, 256, 2048, "int8", "queries and keys", 4, marks=SLOW),
        # Threads have two adjacent values: the compiler's conversion of 8-bit integers. Every warp
        # has the whole query.
        pytest.param(8, 1, 2048, 192, 768, "int8", None, 2, marks=SLOW),
    ],
)
def test_kernels_fit_into_registers(rows, heads, slots, dk, dv, kv, eps, blocks):
    """A multiprocessor has the given number of blocks, and no register is spilled."""

    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16)

    q, v = shape(rows, heads, dk), shape(rows, heads, dv)
    cache = KeyValueCache(shape(rows, heads, slots, dk), shape(rows, heads, slots, dv))
    if kv == "int8":
        cache = KeyValueCache(*map(as_int8, cache))
    positions = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tiling = choose_tiling(rows * heads, slots, dv, itemsize=cache.value.dtype.itemsize)
    k = q
    if eps != "queries and keys":
        q, k = shared_shapes(rows, heads, dk, eps=eps), None
    compiled = compile_for(
        h200_device(), partial(mosaic_gpu.chunk_decode, tiling=tiling), q, k, v, cache, positions, v
    )
    usage = {kernel.name: kernel for kernel in ptxas_usage(compiled)}
    for kernel in usage.values():
        print(f"{kernel.name}: {kernel.registers} registers, {tiling}")
    assert set(usage) == {"chunk_decode_splits", "chunk_decode_combine"}
    assert not any(kernel.spill_bytes for kernel in usage.values())
    # Registers are given out to a warp by eights.
    registers = -(-usage["chunk_decode_splits"].registers // 8) * 8
    assert HOPPER_REGISTERS // (registers * THREADS) >= blocks
