"""Chunk attention over a sequence that is split over devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.types import KeyValueCache


def cache_of_part(
    k: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    chunk_size: int,
    positions: Int32[Array, "B L"],
    axis: str,
) -> KeyValueCache:
    """Keys and values that this device's first tokens see of the part before, C slots of them.

    A document's chunks count from its own start, so they may cross from part to part; then the last
    C keys and values travel one device on. Slots that hold nothing are zero.

    Args:
      k: this device's keys.
      v: this device's values.
      chunk_size: C, at most L.
      positions: of this device's tokens in their documents.
      axis: mesh axis over which the sequence is split.

    Raises:
      ValueError: a chunk is longer than a part.
    """
    length = k.shape[1]
    if chunk_size > length:
        raise ValueError(
            f"a part of the sequence has {length} tokens, fewer than a chunk of {chunk_size}; "
            "split the sequence over fewer devices"
        )
    devices = jax.lax.axis_size(axis)
    onward = [(i, i + 1) for i in range(devices - 1)]
    held = positions[:, :1] % chunk_size
    slot = jnp.arange(chunk_size, dtype=jnp.int32)
    # Slot 0 is the chunk's first token, `held` tokens before this device's first one.
    source = jnp.minimum(chunk_size - held + slot, chunk_size - 1)[:, :, None, None]
    is_filled = (slot < held)[:, :, None, None]

    def take(row: Array) -> Array:
        before = jax.lax.ppermute(row[:, length - chunk_size :], axis, onward)
        return jnp.where(is_filled, jnp.take_along_axis(before, source, axis=1), 0)

    return KeyValueCache(take(k), take(v))
