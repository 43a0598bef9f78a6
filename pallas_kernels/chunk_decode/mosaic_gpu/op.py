"""Chunk decoding on Hopper: checks, the tiling, and the caches as references."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.types import KeyValueCache
from pallas_kernels.chunk_decode.block_sizes import (
    KEY_MULTIPLE,
    MAX_KEY_WIDTH,
    SCORE_SLOTS,
    THREADS,
    DecodeTiling,
    choose_tiling,
)
from pallas_kernels.chunk_decode.mosaic_gpu.kernels import CombineOperands, DecodeOperands
from pallas_kernels.chunk_decode.mosaic_gpu.launch import launch_combination, launch_splits
from pallas_kernels.chunk_decode.mosaic_gpu.token import QueryAndKey
from pallas_kernels.chunk_decode.types import (
    ChunkDecodeOutput,
    SharedRepresentation,
    query_of,
)
from pallas_kernels.common.mosaic_gpu import interpret_params
from pallas_kernels.common.target import check_hopper


def find_obstacle(q: Any, v: Array, cache: KeyValueCache) -> str | None:
    """The reason why the kernels cannot take these operands; None if they can."""
    if {q.dtype, v.dtype} != {jnp.dtype(jnp.bfloat16)}:
        return f"takes bfloat16, q and v are {q.dtype} and {v.dtype}"
    if not q.size or q.shape[2] % KEY_MULTIPLE or not v.size or v.shape[2] % THREADS:
        return (
            f"needs one row, queries of a multiple of {KEY_MULTIPLE} numbers and values of a "
            f"multiple of {THREADS}; q and v have shapes {q.shape} and {v.shape}"
        )
    if q.shape[2] > MAX_KEY_WIDTH:
        return (
            f"keeps queries of up to {MAX_KEY_WIDTH} numbers in registers, these have {q.shape[2]}"
        )
    if cache.key.shape[2] < SCORE_SLOTS:
        return f"needs at least {SCORE_SLOTS} slots, the cache has {cache.key.shape[2]}"
    return None


def chunk_decode(
    q: Float[Array, "B H Dk"] | SharedRepresentation,
    k: Float[Array, "B H Dk"] | None,
    v: Float[Array, "B H Dv"],
    cache: KeyValueCache,
    positions: Int32[Array, " B"],
    gate: Float[Array, "B H Dv"] | None = None,
    *,
    tiling: DecodeTiling | None = None,
) -> ChunkDecodeOutput:
    """Two kernels, the first of which updates the cache in place. Arguments as in `api`.

    Args:
      q: bfloat16, as all operands but positions, a shared representation and a cache of
        `Int8Slots`.
      k: keys; None with a shared representation.
      v: values.
      cache: key and value.
      positions: of the tokens.
      gate: of the outputs.
      tiling: how slots and value columns are divided into blocks; None: `choose_tiling`.

    Raises:
      ValueError: a shape or dtype that the kernels do not have, or a device that is no Hopper GPU.
    """
    check_hopper("mosaic_gpu")
    obstacle = find_obstacle(query_of(q, v), v, cache)
    if obstacle is not None:
        raise ValueError(f"chunk decoding: mosaic_gpu {obstacle}; use implementation 'xla' or None")
    rows, heads, width = v.shape
    num_slots = cache.key.shape[2]
    tiling = tiling or choose_tiling(
        rows * heads, num_slots, width, itemsize=cache.value.dtype.itemsize
    )
    positions, interpret = positions.astype(jnp.int32), interpret_params()
    references = jax.tree.map(jax.new_ref, cache)
    source = q if isinstance(q, SharedRepresentation) else QueryAndKey(q, k)
    operands = DecodeOperands(source, v, positions, references)
    splits = launch_splits(operands, tiling, interpret=interpret)
    combined = CombineOperands(splits, positions, gate)
    out = launch_combination(combined, num_slots, v.dtype, tiling, interpret=interpret)
    return ChunkDecodeOutput(out, jax.tree.map(jax.freeze, references))
