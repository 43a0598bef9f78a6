"""Chunk attention with a cache of 8-bit integers, for implementations that take none."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Shaped

from pallas_kernels.chunk_attention.types import KeyValueCache, last_token


def next_quantized_cache(
    exact: KeyValueCache,
    cache: KeyValueCache,
    *,
    positions: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"] | None,
) -> KeyValueCache:
    """Rounds the keys and values of new tokens; slots of earlier tokens keep their bits.

    Args:
      exact: the next cache in the dtype of the operands.
      cache: the incoming cache of `Int8Slots`.
      positions: of the row's tokens.
      segment_ids: of the row's tokens.
    """
    is_new = _new_slots(positions, segment_ids, cache.key.shape[2])[:, None]

    def select(new: Shaped[Array, "B H C *D"], old: Shaped[Array, "B H C *D"]) -> Array:
        return jnp.where(is_new.reshape(*is_new.shape, *[1] * (new.ndim - 3)), new, old)

    return jax.tree.map(select, cache.encode(*exact), cache)


def _new_slots(
    positions: Int32[Array, "B L"], segment_ids: Int32[Array, "B L"] | None, num_slots: int
) -> Bool[Array, "B C"]:
    """Slots of the row's last chunk whose tokens are among these."""
    last, position = last_token(positions, segment_ids)
    slot, last_slot = jnp.arange(num_slots), position[:, None] % num_slots
    # The tokens of a chunk are adjacent: this is the index of a slot's token.
    index = last[:, None] - (last_slot - slot)
    return (last[:, None] >= 0) & (slot <= last_slot) & (index >= 0)
