"""Chunk attention by its definition: one dense masked softmax. Slow; float64-capable."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.chunk_attention.context_parallel import KeysInReach
from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    ChunkAttentionOutput,
    KeyValueCache,
    accumulation_dtype,
    dropout_masks,
    last_token,
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
    """Dense attention: L x (C + L) scores and a mask. Arguments as in `api.chunk_attention`."""
    B, L = q.shape[:2]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    if segment_ids is None:
        segment_ids = jnp.ones((B, L), jnp.int32)
    allowed = _allowed_among_tokens(positions, segment_ids, chunk_size)
    own = jnp.broadcast_to(jnp.eye(L, dtype=bool), (B, L, L))
    keys, values = k, v
    if cache is not None:
        cache = cache.swap_heads_and_slots()
        is_filled = jnp.arange(chunk_size) < positions[:, :1] % chunk_size
        in_cache = _allowed_in_cache(positions, segment_ids, is_filled, chunk_size)
        allowed = jnp.concatenate([in_cache, allowed], axis=2)
        own = jnp.concatenate([jnp.zeros_like(in_cache), own], axis=2)
        is_filled = is_filled[:, :, None, None]
        keys = jnp.concatenate([jnp.where(is_filled, cache.key, 0), k], axis=1)
        values = jnp.concatenate([jnp.where(is_filled, cache.value, 0), v], axis=1)
    out = _masked_softmax_attention(q, keys, values, allowed[:, None], own[:, None], dropout)
    if cache is not None:
        cache = _next_cache(k, v, chunk_size, positions, segment_ids, cache)
        cache = cache.swap_heads_and_slots()
    return ChunkAttentionOutput(out, cache)


def noncausal_attention(
    q: Float[Array, "B L H Dk"],
    keys: KeysInReach,
    chunk_size: int | None,
    positions: Int32[Array, "B L"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    dropout: AttentionDropout | None,
) -> Float[Array, "B L H Dv"]:
    """Dense attention to the tokens of a query's document and chunk, before and after it.

    Args:
      q: queries.
      keys: the keys in reach.
      chunk_size: tokens C in a chunk; None: no chunks.
      positions: of the queries in their documents; None: their columns.
      segment_ids: documents of the queries, 0 for padding; None: one document.
      dropout: attention dropout.
    """
    B, L = q.shape[:2]
    S = keys.key.shape[1]
    query, key = jnp.arange(L), jnp.arange(S)
    allowed = jnp.ones((B, L, S), bool)
    if segment_ids is not None and keys.segment_ids is not None:
        allowed &= segment_ids[:, :, None] == keys.segment_ids[:, None, :]
        allowed &= segment_ids[:, :, None] != 0
    if chunk_size is not None:
        of_query = (query[None] if positions is None else positions) // chunk_size
        of_key = (key[None] if keys.positions is None else keys.positions) // chunk_size
        allowed &= of_query[:, :, None] == of_key[:, None, :]
    own = query[:, None] + keys.num_before == key
    own = jnp.broadcast_to(own, allowed.shape)
    return _masked_softmax_attention(
        q, keys.key, keys.value, allowed[:, None], own[:, None], dropout
    )


def _allowed_among_tokens(
    positions: Int32[Array, "B L"], segment_ids: Int32[Array, "B L"], chunk_size: int
) -> Bool[Array, "B L L"]:
    chunk = positions // chunk_size
    index = jnp.arange(positions.shape[1])
    return (
        (index[None, :, None] >= index[None, None, :])
        & (chunk[:, :, None] == chunk[:, None, :])
        & (segment_ids[:, :, None] == segment_ids[:, None, :])
        & (segment_ids[:, :, None] != 0)
    )


def _allowed_in_cache(
    positions: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"],
    is_filled: Bool[Array, "B C"],
    chunk_size: int,
) -> Bool[Array, "B L C"]:
    chunk = positions // chunk_size
    continues = (segment_ids == segment_ids[:, :1]) & (segment_ids != 0) & (chunk == chunk[:, :1])
    return continues[:, :, None] & is_filled[:, None, :]


def _masked_softmax_attention(
    q: Float[Array, "B L H Dk"],
    k: Float[Array, "B S H Dk"],
    v: Float[Array, "B S H Dv"],
    allowed: Bool[Array, "B 1 L S"],
    own: Bool[Array, "B 1 L S"],
    dropout: AttentionDropout | None,
) -> Float[Array, "B L H Dv"]:
    wide = accumulation_dtype(q.dtype)
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("blhd,bshd->bhls", q, k, precision=precision, preferred_element_type=wide)
    factor = None
    if dropout is not None and dropout.rate > 0:
        keep_mask, factor = dropout_masks(dropout, scores.shape, own)
        allowed = allowed if keep_mask is None else allowed & keep_mask
    # A query without keys (padding) takes a softmax over equal finite scores and is then set to 0:
    # neither its output nor any gradient is NaN.
    scores = jnp.where(allowed, scores, jnp.finfo(wide).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    weights = jnp.where(allowed, weights, 0)
    if factor is not None:
        weights = weights * factor
    return jnp.einsum(
        "bhls,bshd->blhd",
        weights.astype(v.dtype),
        v,
        precision=precision,
        preferred_element_type=wide,
    ).astype(v.dtype)


def _next_cache(
    k: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    chunk_size: int,
    positions: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"],
    cache: KeyValueCache,
) -> KeyValueCache:
    slot = jnp.arange(chunk_size)
    last, position = last_token(positions, segment_ids)
    document = jnp.take_along_axis(segment_ids, jnp.maximum(last, 0)[:, None], axis=1)
    chunk = (position // chunk_size)[:, None]
    full = ((position + 1) % chunk_size == 0)[:, None]

    current = (segment_ids == document) & (positions // chunk_size == chunk)
    fills = current[:, None, :] & (positions[:, None, :] % chunk_size == slot[None, :, None])
    first_document = (document == segment_ids[:, :1]) & (chunk == positions[:, :1] // chunk_size)
    stays = first_document & (slot < positions[:, :1] % chunk_size)

    def update(new: Array, old: Array) -> Array:
        placed = jnp.einsum(
            "bcl,blhd->bchd", fills.astype(new.dtype), new, precision=matmul_precision(new.dtype)
        )
        written = jnp.where(stays[:, :, None, None], old, placed)
        written = jnp.where(full[:, :, None, None], 0, written)
        return jnp.where((last < 0)[:, None, None, None], old, written)

    return KeyValueCache(update(k, cache.key), update(v, cache.value))
