"""Chunk decoding in plain JAX for any platform: writes one slot of the cache, copies none."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.chunk_attention.types import (
    KeyValueCache,
    accumulation_dtype,
    matmul_precision,
)
from pallas_kernels.chunk_decode.block_sizes import CPU_SLOTS, QUERY_ROWS
from pallas_kernels.chunk_decode.types import ChunkDecodeOutput
from pallas_kernels.common.target import find_target


def chunk_decode(
    q: Float[Array, "B H Dk"],
    k: Float[Array, "B H Dk"],
    v: Float[Array, "B H Dv"],
    cache: KeyValueCache,
    positions: Int32[Array, " B"],
    gate: Float[Array, "B H Dv"] | None,
) -> ChunkDecodeOutput:
    """One softmax over all slots, or over blocks of them. Arguments as in `api.chunk_decode`."""
    slot = positions.astype(jnp.int32) % cache.key.shape[2]
    cache = KeyValueCache(_write(cache.key, slot, k), _write(cache.value, slot, v))
    # A loop of unknown length is cheap on a CPU alone, where masks of whole values are copies.
    attend = _attend_blocks if find_target().platform == "cpu" else _attend_all
    out = attend(q, cache, slot)
    if gate is not None:
        out = out * jax.nn.silu(gate.astype(out.dtype))
    return ChunkDecodeOutput(out.astype(v.dtype), cache)


def _write(
    slots: Float[Array, "S H C D"], slot: Int32[Array, " B"], new: Float[Array, "B H D"]
) -> Float[Array, "S H C D"]:
    rows = jnp.arange(new.shape[0], dtype=jnp.int32)
    return slots.at[rows, :, slot].set(
        new, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
    )


def _attend_all(
    q: Float[Array, "B H Dk"], cache: KeyValueCache, slot: Int32[Array, " B"]
) -> Float[Array, "B H Dv"]:
    num_rows, num_slots = q.shape[0], cache.key.shape[2]
    # A slice of all rows is no operation; of fewer, the keys are copied.
    key, value = (slots[:num_rows] for slots in cache)
    is_filled = (jnp.arange(num_slots) <= slot[:, None])[:, None]
    scores = jnp.where(is_filled, _scores(q, key), -jnp.inf)
    return _weighted_values(jax.nn.softmax(scores, axis=-1), value, is_filled)


def _attend_blocks(
    q: Float[Array, "B H Dk"], cache: KeyValueCache, slot: Int32[Array, " B"]
) -> Float[Array, "B H Dv"]:
    """Blocks of slots up to the last one that any row has filled, with a running maximum."""
    num_slots = cache.key.shape[2]
    size = min(CPU_SLOTS, num_slots)
    wide = accumulation_dtype(q.dtype)

    def add_block(block, carry):
        m_i, l_i, acc = carry
        # The last block ends with the chunk, and begins with slots of the block before.
        start = jnp.minimum(block * size, num_slots - size)
        key, value = (
            lax.dynamic_slice_in_dim(slots[: q.shape[0]], start, size, axis=2) for slots in cache
        )
        index = start + jnp.arange(size)
        is_used = ((index >= block * size) & (index <= slot[:, None]))[:, None]
        scores = jnp.where(is_used, _scores(q, key), -jnp.inf)
        # The first block has slot 0 of every row: the maximum is finite from there on.
        new_m_i = jnp.maximum(m_i, scores.max(axis=-1))
        weights = jnp.exp(scores - new_m_i[..., None])
        decay = jnp.exp(m_i - new_m_i)
        terms = _weighted_values(weights, value, is_used)
        return new_m_i, l_i * decay + weights.sum(axis=-1), acc * decay[..., None] + terms

    carry = (
        jnp.full(q.shape[:2], -jnp.inf, wide),
        jnp.zeros(q.shape[:2], wide),
        jnp.zeros((*q.shape[:2], cache.value.shape[3]), wide),
    )
    num_blocks = jnp.max(slot, initial=-1) // size + 1
    _, l_i, acc = lax.fori_loop(0, num_blocks, add_block, carry)
    return acc / l_i[..., None]


def _scores(q: Float[Array, "B H Dk"], key: Float[Array, "B H C Dk"]) -> Float[Array, "B H C"]:
    padded = jnp.pad(q[:, :, None], ((0, 0), (0, 0), (0, QUERY_ROWS - 1), (0, 0)))
    return jnp.einsum(
        "bhqd,bhcd->bhqc",
        padded,
        key,
        precision=matmul_precision(q.dtype),
        preferred_element_type=accumulation_dtype(q.dtype),
    )[:, :, 0]


def _weighted_values(
    weights: Float[Array, "B H C"], value: Float[Array, "B H C Dv"], is_used: Bool[Array, "B 1 C"]
) -> Float[Array, "B H Dv"]:
    # A sum and no matrix product: unused slots may hold NaN, and the mask of a product's operand is
    # a copy of it.
    terms = weights[..., None] * value.astype(weights.dtype)
    return jnp.sum(jnp.where(is_used[..., None], terms, 0), axis=2)
