"""Rows of cache and tokens laid end to end, and the interval of keys that every query sees."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.types import KeyValueCache, last_token


def interval_starts(
    positions: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"] | None,
    chunk_size: int,
    left: int,
    held: Int32[Array, "B 1"],
) -> Int32[Array, "B L"]:
    """The first key that every query sees, after its own if it sees none.

    Args:
      positions: of tokens in their documents.
      segment_ids: documents of the row.
      chunk_size: tokens in a chunk.
      left: keys before the row's first token.
      held: of those, how many a cache filled; they are the last ones.
    """
    B, L = positions.shape
    index = left + jnp.arange(L, dtype=jnp.int32)
    start = index - positions % chunk_size
    if segment_ids is None:
        return jnp.maximum(start, left - held)
    border = segment_ids[:, 1:] != segment_ids[:, :-1]
    border = jnp.concatenate([jnp.zeros((B, 1), bool), border], axis=1)
    document = jax.lax.cummax(jnp.where(border, index, left - held), axis=1)
    # An interval that starts after its query is empty.
    return jnp.where(segment_ids != 0, jnp.maximum(start, document), index + 1)


def align_right(
    slots: Float[Array, "B C H D"], held: Int32[Array, "B 1"]
) -> Float[Array, "B C H D"]:
    """Moves the `held` first slots of each row to its end and zeroes the others."""
    C = slots.shape[1]
    slot = jnp.arange(C, dtype=jnp.int32)
    rolled = jnp.take_along_axis(slots, ((slot + held) % C)[:, :, None, None], axis=1)
    return jnp.where((slot >= C - held)[:, :, None, None], rolled, 0)


def next_cache(
    k_row: Float[Array, "B C+L H Dk"],
    v_row: Float[Array, "B C+L H Dv"],
    chunk_size: int,
    positions: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"] | None,
    cache: KeyValueCache,
) -> KeyValueCache:
    """The cache after the row's last token, from keys and values of cache and tokens."""
    last, position = last_token(positions, segment_ids)
    last, filled = last[:, None], (position[:, None] + 1) % chunk_size
    slot = jnp.arange(chunk_size, dtype=jnp.int32)
    source = jnp.minimum(chunk_size + last + 1 - filled + slot, k_row.shape[1] - 1)
    filled_slot = (slot < filled)[:, :, None, None]

    def take(row: Array, old: Array) -> Array:
        chunk = jnp.take_along_axis(row, source[:, :, None, None], axis=1)
        return jnp.where((last < 0)[:, :, None, None], old, jnp.where(filled_slot, chunk, 0))

    return KeyValueCache(take(k_row, cache.key), take(v_row, cache.value))


def pad_length(x: Array, length: int) -> Array:
    """Adds zeros after the row."""
    missing = length - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x
