"""Chunk attention as attention over intervals of keys.

Cached keys and the row's keys lie end to end. A document's tokens are contiguous, so every query
sees one interval of keys that ends with its own: start .. key_offset + t for query t. All
implementations but the reference compute this form. Without causality the interval also goes on
after the query (`noncausal_intervals`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.chunk_attention.context_parallel import KeysInReach
from pallas_kernels.chunk_attention.types import ChunkAttentionOutput, KeyValueCache, last_token

# attend(q, k, v, start) with k and v of `key_offset` + L tokens, to (B, L, H, Dv).
IntervalAttention = Callable[[Array, Array, Array, Array], Array]


def attend_intervals(
    attend: IntervalAttention,
    q: Float[Array, "B L H Dk"],
    k: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    *,
    chunk_size: int,
    positions: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"] | None,
    cache: KeyValueCache | None,
    key_offset: int,
    zero_padding: bool,
) -> ChunkAttentionOutput:
    """Chunk attention by an implementation of interval attention.

    Args:
      attend: attention of every query t to keys start[t] .. key_offset + t.
      q: queries.
      k: keys.
      v: values.
      chunk_size: tokens C in a chunk.
      positions: of tokens in their documents.
      segment_ids: documents of the row, 0 for padding.
      cache: cached tokens of the current chunk, (B, H, C, d).
      key_offset: keys before the row's first token that `attend` wants; at least C with a cache.
      zero_padding: whether `attend` needs zeros at padding. It does if it multiplies weights of
        zero by padding, because 0 times NaN is NaN.
    """
    num_cached = jnp.zeros((q.shape[0], 1), jnp.int32)
    if cache is not None:
        cache = cache.swap_heads_and_slots()
        num_cached = positions[:, :1] % chunk_size
    start = interval_starts(positions, segment_ids, chunk_size, key_offset, num_cached)
    is_token = None
    if zero_padding and segment_ids is not None:
        is_token = (segment_ids != 0)[:, :, None, None]
        q, k, v = (jnp.where(is_token, x, 0) for x in (q, k, v))
    all_k, all_v = k, v
    if cache is not None:
        all_k = jnp.concatenate([_align_right(cache.key, num_cached), k], axis=1)
        all_v = jnp.concatenate([_align_right(cache.value, num_cached), v], axis=1)
    left_padding = key_offset - (all_k.shape[1] - q.shape[1])
    out = attend(q, pad_length(all_k, left_padding, 0), pad_length(all_v, left_padding, 0), start)
    if is_token is not None:
        out = zero_unless(is_token, out)
    if cache is not None:
        cache = _next_cache(all_k, all_v, chunk_size, positions, segment_ids, cache)
        cache = cache.swap_heads_and_slots()
    return ChunkAttentionOutput(out, cache)


def interval_starts(
    positions: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"] | None,
    chunk_size: int,
    key_offset: int,
    num_cached: Int32[Array, "B 1"],
) -> Int32[Array, "B L"]:
    """The first key that every query sees; the key after its own for padding, which sees none.

    Args:
      positions: of tokens in their documents.
      segment_ids: documents of the row.
      chunk_size: tokens in a chunk.
      key_offset: keys before the row's first token.
      num_cached: how many of those hold cached tokens; they are the last ones.
    """
    B, L = positions.shape
    own_key = key_offset + jnp.arange(L, dtype=jnp.int32)
    start = own_key - positions % chunk_size
    if segment_ids is None:
        return jnp.maximum(start, key_offset - num_cached)
    is_first = segment_ids[:, 1:] != segment_ids[:, :-1]
    is_first = jnp.concatenate([jnp.zeros((B, 1), bool), is_first], axis=1)
    document_start = jnp.where(is_first, own_key, key_offset - num_cached)
    document_start = jax.lax.cummax(document_start, axis=1)
    return jnp.where(segment_ids != 0, jnp.maximum(start, document_start), own_key + 1)


def noncausal_intervals(
    keys: KeysInReach, chunk_size: int | None, num_queries: int
) -> tuple[Int32[Array, "B L"], Int32[Array, "B L"]]:
    """The first key that every query sees without causality, and the key after the last one.

    Padding has an empty interval.

    Args:
      keys: the keys in reach.
      chunk_size: tokens C in a chunk; None: no chunks.
      num_queries: queries of a row; the first one's own key is `keys.num_before`.
    """
    B, S = keys.key.shape[:2]
    key = jnp.arange(S, dtype=jnp.int32)
    start, stop = jnp.zeros((B, S), jnp.int32), jnp.full((B, S), S, jnp.int32)
    ids = keys.segment_ids
    if ids is not None:
        changes = ids[:, 1:] != ids[:, :-1]
        edge = jnp.ones((B, 1), bool)
        is_first = jnp.concatenate([edge, changes], axis=1)
        is_last = jnp.concatenate([changes, edge], axis=1)
        start = jax.lax.cummax(jnp.where(is_first, key, 0), axis=1)
        stop = jax.lax.cummin(jnp.where(is_last, key + 1, S), axis=1, reverse=True)
    if chunk_size is not None:
        # A chunk of a document in reach may begin before the first key.
        chunk_start = key - (key if keys.positions is None else keys.positions) % chunk_size
        start, stop = jnp.maximum(start, chunk_start), jnp.minimum(stop, chunk_start + chunk_size)
    if ids is not None:
        stop = jnp.where(ids != 0, stop, start)
    before = jnp.asarray(keys.num_before, jnp.int32)

    def of_queries(bound: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(bound, before, num_queries, axis=1)

    return of_queries(start), of_queries(stop)


def pad_length(x: Float[Array, "B L H D"], before: int, after: int) -> Float[Array, "B _ H D"]:
    """Adds zeros before and after the row."""
    if before == 0 and after == 0:
        return x
    return jnp.pad(x, ((0, 0), (before, after), (0, 0), (0, 0)))


def _align_right(
    slots: Float[Array, "B C H D"], num_cached: Int32[Array, "B 1"]
) -> Float[Array, "B C H D"]:
    """Moves each row's first `num_cached` slots to its end and zeroes the others."""
    C = slots.shape[1]
    slot = jnp.arange(C, dtype=jnp.int32)
    rolled = jnp.take_along_axis(slots, ((slot + num_cached) % C)[:, :, None, None], axis=1)
    return zero_unless((slot >= C - num_cached)[:, :, None, None], rolled)


def _next_cache(
    k: Float[Array, "B C+L H Dk"],
    v: Float[Array, "B C+L H Dv"],
    chunk_size: int,
    positions: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"] | None,
    cache: KeyValueCache,
) -> KeyValueCache:
    """The cache after the row's last token, from cached and new keys and values end to end."""
    last, position = last_token(positions, segment_ids)
    last, num_cached = last[:, None], (position[:, None] + 1) % chunk_size
    slot = jnp.arange(chunk_size, dtype=jnp.int32)
    source = jnp.minimum(chunk_size + last + 1 - num_cached + slot, k.shape[1] - 1)
    is_filled = (slot < num_cached)[:, :, None, None]

    def take(tokens: Array, previous: Array) -> Array:
        chunk = jnp.take_along_axis(tokens, source[:, :, None, None], axis=1)
        is_padding_row = (last < 0)[:, :, None, None]
        return jnp.where(is_padding_row, previous, zero_unless(is_filled, chunk))

    return KeyValueCache(take(k, cache.key), take(v, cache.value))


def zero_unless(condition: Bool[Array, "..."], x: Array) -> Array:
    """A selection, not a product: 0 times NaN is NaN."""
    return jnp.where(condition, x, 0)
