"""Chunk decoding in plain JAX for any platform: writes one slot of the cache, copies none."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from pallas_kernels.chunk_attention.types import (
    Int8Slots,
    KeyValueCache,
    Slots,
    accumulation_dtype,
    matmul_precision,
)
from pallas_kernels.chunk_decode.block_sizes import CPU_SLOTS, PADDED_QUERIES
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
    cache = jax.tree.map(partial(write_slots, slot=slot), cache, cache.encode(k, v))
    # A loop of unknown length is cheap on a CPU alone, where masks of whole values are copies.
    attend = _attend_blocks if find_target().platform == "cpu" else _attend_all
    out = attend(q, cache, slot, v.dtype)
    if gate is not None:
        out = out * jax.nn.silu(gate.astype(out.dtype))
    return ChunkDecodeOutput(out.astype(v.dtype), cache)


def write_slots(
    slots: Shaped[Array, "S H C *D"], new: Shaped[Array, "B H *D"], slot: Int32[Array, " B"]
) -> Shaped[Array, "S H C *D"]:
    """The cache with the tokens' arrays in slots of rows 0..B-1, in place where it is donated."""
    options: Any = {"mode": "promise_in_bounds", "unique_indices": True}
    if slots.shape[0] == new.shape[0]:
        # With row numbers as indices, XLA would gather the caches of all devices.
        return jax.vmap(lambda slots, slot, new: slots.at[:, slot].set(new, **options))(
            slots, slot, new
        )
    rows = jnp.arange(new.shape[0], dtype=jnp.int32)
    return slots.at[rows, :, slot].set(new, indices_are_sorted=True, **options)


def _attend_all(
    q: Float[Array, "B H Dk"], cache: KeyValueCache, slot: Int32[Array, " B"], dtype: Any
) -> Float[Array, "B H Dv"]:
    num_rows, num_slots = q.shape[0], cache.key.shape[2]
    # A slice of all rows is no operation; of fewer, the keys are copied.
    key, value = jax.tree.map(lambda slots: slots[:num_rows], cache)
    is_filled = (jnp.arange(num_slots) <= slot[:, None])[:, None]
    on_gpu = find_target().platform == "gpu"
    scores = _scores(q, key, PADDED_QUERIES if on_gpu else 1)
    weights = jax.nn.softmax(jnp.where(is_filled, scores, -jnp.inf), axis=-1)
    if not on_gpu:
        return _weighted_values(weights, value, is_filled, PADDED_QUERIES, dtype)
    # A sum and no product, whose operand a GPU would mask by a copy.
    if isinstance(value, Int8Slots):
        weights, value = weights * value.scale, value.values
    terms = weights[..., None] * value.astype(weights.dtype)
    return jnp.sum(jnp.where(is_filled[..., None], terms, 0), axis=2)


def _attend_blocks(
    q: Float[Array, "B H Dk"], cache: KeyValueCache, slot: Int32[Array, " B"], dtype: Any
) -> Float[Array, "B H Dv"]:
    """Blocks of slots up to the last one that any row has filled, with a running maximum."""
    num_slots = cache.key.shape[2]
    size = min(CPU_SLOTS, num_slots)
    wide = accumulation_dtype(q.dtype)

    def add_block(block, carry):
        m_i, l_i, acc = carry
        # The last block ends with the chunk, and begins with slots of the block before.
        start = jnp.minimum(block * size, num_slots - size)
        key, value = jax.tree.map(
            lambda slots: lax.dynamic_slice_in_dim(slots[: q.shape[0]], start, size, axis=2), cache
        )
        index = start + jnp.arange(size)
        is_used = ((index >= block * size) & (index <= slot[:, None]))[:, None]
        scores = jnp.where(is_used, _scores(q, key, 1), -jnp.inf)
        # The first block has slot 0 of every row: the maximum is finite from there on.
        new_m_i = jnp.maximum(m_i, scores.max(axis=-1))
        weights = jnp.exp(scores - new_m_i[..., None])
        decay = jnp.exp(m_i - new_m_i)
        terms = _weighted_values(weights, value, is_used, 1, dtype)
        return new_m_i, l_i * decay + weights.sum(axis=-1), acc * decay[..., None] + terms

    carry = (
        jnp.full(q.shape[:2], -jnp.inf, wide),
        jnp.zeros(q.shape[:2], wide),
        jnp.zeros((*q.shape[:2], cache.value.shape[3]), wide),
    )
    num_blocks = jnp.max(slot, initial=-1) // size + 1
    _, l_i, acc = lax.fori_loop(0, num_blocks, add_block, carry)
    return acc / l_i[..., None]


def _scores(q: Float[Array, "B H Dk"], key: Slots, num_queries: int) -> Float[Array, "B H C"]:
    if isinstance(key, Int8Slots):
        # Every integer is exact in bfloat16 too; the scale of a token multiplies its score.
        return _scores(q, key.values.astype(q.dtype), num_queries) * key.scale
    return _multiply_padded("bhqd,bhcd->bhqc", q, key, num_queries)


def _weighted_values(
    weights: Float[Array, "B H C"],
    value: Slots,
    is_used: Bool[Array, "B 1 C"],
    num_queries: int,
    dtype: Any,
) -> Float[Array, "B H Dv"]:
    # Unused slots may hold NaN, and 0 times NaN is NaN.
    if isinstance(value, Int8Slots):
        weights = weights * jnp.where(is_used, value.scale, 0)
        value = value.values.astype(dtype)
    else:
        value = jnp.where(is_used[..., None], value, 0)
    return _multiply_padded("bhqc,bhcd->bhqd", weights.astype(dtype), value, num_queries)


def _multiply_padded(subscripts: str, x: Array, matrix: Array, num_queries: int) -> Array:
    """A product whose left operand has `num_queries` rows, all 0 but the first."""
    padded = jnp.pad(x[:, :, None], ((0, 0), (0, 0), (0, num_queries - 1), (0, 0)))
    return jnp.einsum(
        subscripts,
        padded,
        matrix,
        precision=matmul_precision(matrix.dtype),
        preferred_element_type=accumulation_dtype(matrix.dtype),
    )[:, :, 0]
