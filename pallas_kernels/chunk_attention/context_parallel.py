"""Chunk attention with context parallelism: the cache with which each sequence shard starts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.types import KeyValueCache


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
    if k.shape[1] % chunk_size:
        raise ValueError(
            f"a sequence shard has {k.shape[1]} tokens, no multiple of the chunk of {chunk_size}; "
            "use whole chunks in every shard, or pass positions"
        )
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
    if chunk_size > length:
        raise ValueError(
            f"a sequence shard has {length} tokens, fewer than a chunk of {chunk_size}; "
            "shard the sequence over fewer devices"
        )
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
