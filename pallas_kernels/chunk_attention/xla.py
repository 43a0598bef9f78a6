"""Chunk attention for any platform: blocks of queries against the keys they can reach.

Every query t attends to one interval [start[t], t] of (cache, tokens) laid end to end, and start[t]
is fewer than C tokens away. So a block of queries needs its own tokens and at most C before them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.blocks import BlockPlan, attend_blocks
from pallas_kernels.chunk_attention.intervals import (
    align_right,
    interval_starts,
    next_cache,
    pad_length,
)
from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    ChunkAttentionOutput,
    KeyValueCache,
    accumulation_dtype,
    dropout_masks,
    matmul_precision,
)


def chunk_attention(
    q: Float[Array, "B L H Dk"],
    k: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    chunk_size: int,
    positions: Int32[Array, "B L"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    cache: KeyValueCache | None,
    dropout: AttentionDropout | None,
) -> ChunkAttentionOutput:
    """Blocked attention: never L x L scores. Arguments as in `api.chunk_attention`."""
    if dropout is not None and dropout.rate == 0:
        dropout = None
    if positions is None:
        return ChunkAttentionOutput(_attend_aligned(q, k, v, chunk_size, dropout), None)
    if cache is not None and q.shape[1] == 1:
        return _decode(q, k, v, chunk_size, positions, segment_ids, cache, dropout)
    return _attend_intervals(q, k, v, chunk_size, positions, segment_ids, cache, dropout)


def _attend_aligned(
    q: Array, k: Array, v: Array, chunk_size: int, dropout: AttentionDropout | None
) -> Array:
    L = q.shape[1]
    plan = BlockPlan.make(q.shape, chunk_size, left=0)
    q, k, v = (pad_length(x, plan.length) for x in (q, k, v))
    return attend_blocks(plan, q, k, v, None, dropout)[:, :L]


def _attend_intervals(
    q: Array,
    k: Array,
    v: Array,
    chunk_size: int,
    positions: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"] | None,
    cache: KeyValueCache | None,
    dropout: AttentionDropout | None,
) -> ChunkAttentionOutput:
    B, L = positions.shape
    left = chunk_size if cache is not None or chunk_size < L else 0
    plan = BlockPlan.make(q.shape, chunk_size, left=left)
    # Index of the row's first usable key: cached tokens end where the row's tokens begin.
    held = positions[:, :1] % chunk_size if cache is not None else jnp.zeros((B, 1), jnp.int32)
    start = interval_starts(positions, segment_ids, chunk_size, left, held)
    k_row, v_row = k, v
    if cache is not None:
        k_row = jnp.concatenate([align_right(cache.key, held), k], axis=1)
        v_row = jnp.concatenate([align_right(cache.value, held), v], axis=1)
    elif left:
        k_row, v_row = (jnp.pad(x, ((0, 0), (left, 0), (0, 0), (0, 0))) for x in (k, v))

    padding = plan.length - L
    out = attend_blocks(
        plan,
        pad_length(q, plan.length),
        pad_length(k_row, left + plan.length),
        pad_length(v_row, left + plan.length),
        jnp.pad(start, ((0, 0), (0, padding)), constant_values=left + plan.length),
        dropout,
    )[:, :L]
    if cache is not None:
        cache = next_cache(k_row, v_row, chunk_size, positions, segment_ids, cache)
    return ChunkAttentionOutput(out, cache)


def _decode(
    q: Float[Array, "B 1 H Dk"],
    k: Float[Array, "B 1 H Dk"],
    v: Float[Array, "B 1 H Dv"],
    chunk_size: int,
    positions: Int32[Array, "B 1"],
    segment_ids: Int32[Array, "B 1"] | None,
    cache: KeyValueCache,
    dropout: AttentionDropout | None,
) -> ChunkAttentionOutput:
    """One token a row: writes its slot, then one softmax over the chunk's slots."""
    B = q.shape[0]
    position = positions[:, 0] % chunk_size
    valid = jnp.ones((B,), bool) if segment_ids is None else segment_ids[:, 0] != 0
    # Padding writes past the end, which drops it. Mapped over rows: indexing with row numbers would
    # make XLA gather the caches of all devices.
    target = jnp.where(valid, position, chunk_size)
    write = jax.vmap(lambda slots, slot, new: slots.at[slot].set(new, mode="drop"))
    key, value = write(cache.key, target, k[:, 0]), write(cache.value, target, v[:, 0])

    wide = accumulation_dtype(q.dtype)
    scores = jnp.einsum(
        "bhd,bchd->bhc",
        q[:, 0],
        key,
        precision=matmul_precision(q.dtype),
        preferred_element_type=wide,
    )
    slot = jnp.arange(chunk_size)
    filled = (slot <= position[:, None]) & valid[:, None]
    allowed, factor = filled[:, None], None
    if dropout is not None:
        own = (slot == position[:, None])[:, None]
        kept, factor = dropout_masks(dropout, scores.shape, own)
        allowed = allowed if kept is None else allowed & kept
    scores = jnp.where(allowed, scores, jnp.finfo(wide).min)
    weights = jnp.where(allowed, jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    if factor is not None:
        weights = weights * factor
    out = jnp.einsum(
        "bhc,bchd->bhd",
        weights.astype(v.dtype),
        # Unfilled slots may hold anything, and 0 times a NaN is a NaN.
        jnp.where(filled[:, :, None, None], value, 0),
        precision=matmul_precision(v.dtype),
        preferred_element_type=wide,
    )
    return ChunkAttentionOutput(out.astype(v.dtype)[:, None], KeyValueCache(key, value))
