"""Chunk attention in plain JAX for any platform: blocks of queries against the keys in reach."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.blocks import AttentionBlocks, attend_blocks
from pallas_kernels.chunk_attention.intervals import attend_intervals, pad_length
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
    """Blocked attention, which never makes L x L scores. Arguments as in `api.chunk_attention`."""
    if dropout is not None and dropout.rate == 0:
        dropout = None
    L = q.shape[1]
    if cache is not None and positions is not None and L == 1:
        return _decode(q, k, v, chunk_size, positions, segment_ids, cache, dropout)
    # Without positions chunks begin with blocks; else a block of queries also needs the C keys
    # before its own.
    reaches_back = positions is not None and (cache is not None or chunk_size < L)
    key_offset = chunk_size if reaches_back else 0
    blocks = AttentionBlocks.make(q.shape, chunk_size, key_offset=key_offset)
    after = blocks.length - L

    def attend(q: Array, k: Array, v: Array, start: Array | None) -> Array:
        q, k, v = (pad_length(x, 0, after) for x in (q, k, v))
        if start is not None:
            # Padding after the row sees no key.
            beyond = key_offset + blocks.length
            start = jnp.pad(start, ((0, 0), (0, after)), constant_values=beyond)
        return attend_blocks(blocks, q, k, v, start, dropout)[:, :L]

    if positions is None:
        return ChunkAttentionOutput(attend(q, k, v, None), None)
    return attend_intervals(
        attend,
        q,
        k,
        v,
        chunk_size=chunk_size,
        positions=positions,
        segment_ids=segment_ids,
        cache=cache,
        key_offset=key_offset,
        zero_padding=False,
    )


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
    is_token = jnp.ones((B,), bool) if segment_ids is None else segment_ids[:, 0] != 0
    # Padding writes past the end, which drops it. Mapped over rows: indexing with row numbers would
    # make XLA gather the caches of all devices.
    target = jnp.where(is_token, position, chunk_size)
    write = jax.vmap(lambda slots, slot, new: slots.at[:, slot].set(new, mode="drop"))
    key, value = write(cache.key, target, k[:, 0]), write(cache.value, target, v[:, 0])

    slot = jnp.arange(chunk_size)
    is_filled = (slot <= position[:, None]) & is_token[:, None]
    own = (slot == position[:, None])[:, None]
    weights = _decode_weights(q, key, is_filled[:, None], own, dropout)
    out = jnp.einsum(
        "bhc,bhcd->bhd",
        weights.astype(v.dtype),
        # Empty slots may hold anything, and 0 times NaN is NaN.
        jnp.where(is_filled[:, None, :, None], value, 0),
        precision=matmul_precision(v.dtype),
        preferred_element_type=accumulation_dtype(q.dtype),
    )
    return ChunkAttentionOutput(out.astype(v.dtype)[:, None], KeyValueCache(key, value))


def _decode_weights(
    q: Float[Array, "B 1 H Dk"],
    key: Float[Array, "B H C Dk"],
    allowed: Array,
    own: Array,
    dropout: AttentionDropout | None,
) -> Float[Array, "B H C"]:
    wide = accumulation_dtype(q.dtype)
    scores = jnp.einsum(
        "bhd,bhcd->bhc",
        q[:, 0],
        key,
        precision=matmul_precision(q.dtype),
        preferred_element_type=wide,
    )
    factor = None
    if dropout is not None:
        keep_mask, factor = dropout_masks(dropout, scores.shape, own)
        allowed = allowed if keep_mask is None else allowed & keep_mask
    scores = jnp.where(allowed, scores, jnp.finfo(wide).min)
    weights = jnp.where(allowed, jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    return weights if factor is None else weights * factor
