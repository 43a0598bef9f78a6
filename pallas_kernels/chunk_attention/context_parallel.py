"""Chunk attention with context parallelism: the cache with which each sequence shard starts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.types import KeyValueCache


class KeysInReach(NamedTuple):
    """Keys and values that a device's queries may see in non-causal attention.

    Attributes:
      key: keys after RoPE.
      value: values.
      positions: of the keys in their documents; None as those of the queries.
      segment_ids: documents of the keys; None as those of the queries.
      num_before: keys before the one of the first query.
    """

    key: Float[Array, "B S H Dk"]
    value: Float[Array, "B S H Dv"]
    positions: Int32[Array, "B S"] | None
    segment_ids: Int32[Array, "B S"] | None
    num_before: int | Int32[Array, ""]


def keys_in_reach(
    k: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    *,
    chunk_size: int | None,
    positions: Int32[Array, "B L"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    axis: str | None,
) -> KeysInReach:
    """The keys of non-causal attention: this device's, and those of other sequence shards.

    Without chunks that is the whole row, by an all-gather. Chunks that begin with documents may
    cross the borders of shards: every device sends its first and its last C tokens to its
    neighbours. Chunks that begin with the shards need no exchange.

    Args:
      k: this device's keys.
      v: this device's values.
      chunk_size: tokens C in a chunk; None: no chunks.
      positions: of this device's tokens in their documents; None: chunks begin with the row.
      segment_ids: of this device's tokens.
      axis: mesh axis over which the sequence is sharded; None: it is not.

    Raises:
      ValueError: a chunk is longer than a sequence shard, or without positions a sequence shard
        does not hold whole chunks.
    """
    if axis is None:
        return KeysInReach(k, v, positions, segment_ids, 0)
    length = k.shape[1]
    if chunk_size is None:
        tokens = jax.tree.map(
            lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True),
            KeysInReach(k, v, positions, segment_ids, 0)._replace(num_before=None),
        )
        return tokens._replace(num_before=jax.lax.axis_index(axis) * length)
    if positions is None:
        check_whole_chunks(length, chunk_size)
        return KeysInReach(k, v, None, segment_ids, 0)
    _check_chunk_fits(length, chunk_size)
    if segment_ids is None:
        segment_ids = jnp.ones_like(positions)
    shards = jax.lax.axis_size(axis)
    to_next = [(i, i + 1) for i in range(shards - 1)]
    to_previous = [(i + 1, i) for i in range(shards - 1)]

    def with_neighbours(x: Array) -> Array:
        # The first and the last shard receive zeros: segment ids of padding.
        before = jax.lax.ppermute(x[:, length - chunk_size :], axis, to_next)
        after = jax.lax.ppermute(x[:, :chunk_size], axis, to_previous)
        return jnp.concatenate([before, x, after], axis=1)

    return KeysInReach(
        with_neighbours(k),
        with_neighbours(v),
        with_neighbours(positions),
        with_neighbours(segment_ids),
        chunk_size,
    )


def check_whole_chunks(length: int, chunk_size: int) -> None:
    """Raises ValueError unless a sequence shard of `length` tokens holds whole chunks."""
    if length % chunk_size:
        raise ValueError(
            f"a sequence shard has {length} tokens, no multiple of the chunk of {chunk_size}; "
            "use whole chunks in every shard, or pass positions"
        )


def _check_chunk_fits(length: int, chunk_size: int) -> None:
    if chunk_size > length:
        raise ValueError(
            f"a sequence shard has {length} tokens, fewer than a chunk of {chunk_size}; "
            "shard the sequence over fewer devices"
        )


def incoming_cache(
    k: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    *,
    chunk_size: int,
    positions: Int32[Array, "B L"] | None,
    cache: KeyValueCache | None,
    axis: str,
) -> KeyValueCache | None:
    """Keys and values that this device's first tokens see in the sequence shard before its own.

    Args:
      k: this device's keys.
      v: this device's values.
      chunk_size: tokens C in a chunk.
      positions: of this device's tokens in their documents; None: chunks begin with the shards.
      cache: the caller's cache, which must be None.
      axis: mesh axis over which the sequence is sharded.

    Returns:
      The cache; None if every shard holds whole chunks.

    Raises:
      ValueError: there is a cache, a chunk is longer than a sequence shard, or without positions
        a sequence shard does not hold whole chunks.
    """
    if cache is not None:
        raise ValueError("sequence_axis shards the sequence over devices; pass None for cache")
    if positions is not None:
        return previous_shard_cache(k, v, chunk_size, positions, axis)
    check_whole_chunks(k.shape[1], chunk_size)
    return None


def previous_shard_cache(
    k: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    chunk_size: int,
    positions: Int32[Array, "B L"],
    axis: str,
) -> KeyValueCache:
    """The current chunk's tokens in the previous sequence shard, as a cache of C slots.

    A document's chunks count from its first token, so a chunk may cross the border between two
    shards. Every device sends its last C keys and values to the next one. Empty slots are zero.

    Args:
      k: this device's keys.
      v: this device's values.
      chunk_size: C, at most L.
      positions: of this device's tokens in their documents.
      axis: mesh axis over which the sequence is sharded.

    Raises:
      ValueError: a chunk is longer than a sequence shard.
    """
    length = k.shape[1]
    _check_chunk_fits(length, chunk_size)
    to_next_device = [(i, i + 1) for i in range(jax.lax.axis_size(axis) - 1)]
    num_cached = positions[:, :1] % chunk_size
    slot = jnp.arange(chunk_size, dtype=jnp.int32)
    # Slot 0 is the chunk's first token, `num_cached` tokens before this device's first one.
    source = jnp.minimum(chunk_size - num_cached + slot, chunk_size - 1)[:, :, None, None]
    is_filled = (slot < num_cached)[:, :, None, None]

    def receive(x: Array) -> Array:
        previous = jax.lax.ppermute(x[:, length - chunk_size :], axis, to_next_device)
        return jnp.where(is_filled, jnp.take_along_axis(previous, source, axis=1), 0)

    return KeyValueCache(receive(k), receive(v)).swap_heads_and_slots()
