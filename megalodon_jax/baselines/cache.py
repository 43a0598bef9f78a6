"""The Transformer's streaming cache: keys and values of all tokens that can still be seen."""

import dataclasses
from typing import Self

import jax
import numpy as np
from jax import numpy as jnp

from megalodon_jax.cache import MAX_POSITION
from megalodon_jax.typing import Array, Bool, Int32
from pallas_kernels.chunk_attention import KeyValueCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransformerCache:
    """Keys (after RoPE) and values of every block; a token of position p is in slot p % S.

    Full attention needs a slot for every token: the cache grows with the context. With a sliding
    window the S slots are a ring buffer of constant size.

    Attributes:
      position: tokens seen of each row's current document.
      segment: segment id of each row's current document, 0 before the first token.
      layers: keys and values of every block, (B, kv heads, S, head width).
      is_ring: whether old tokens may be overwritten.
    """

    position: Int32[Array, " B"]
    segment: Int32[Array, " B"]
    layers: tuple[KeyValueCache, ...]
    is_ring: bool = dataclasses.field(metadata={"static": True})

    @property
    def num_slots(self) -> int:
        """Slots S of every row."""
        return self.layers[0].key.shape[2]

    def check_room(self, length: int) -> None:
        """Raises OverflowError if `length` more tokens do not fit.

        Call it outside `jit`: it reads the positions on the host.
        """
        position = int(np.max(np.asarray(self.position)))
        room = MAX_POSITION if self.is_ring else self.num_slots
        if position + length > room:
            raise OverflowError(
                f"{length} more tokens after position {position} exceed the {room:,} tokens that "
                "this cache holds; make it with a larger max_length"
            )

    def replace_rows(self, rows: Bool[Array, " B"], initial: Self) -> Self:
        """A copy of this cache in which the rows where `rows` is true come from `initial`.

        Keys and values are not replaced, because a row at position 0 reads none of them.
        """
        return dataclasses.replace(
            self,
            position=jnp.where(rows, initial.position, self.position),
            segment=jnp.where(rows, initial.segment, self.segment),
        )

    def with_slots(self, num_slots: int) -> Self:
        """A copy with empty slots added up to `num_slots`; only without a sliding window."""
        added = num_slots - self.num_slots

        def grow(slots: Array) -> Array:
            return jnp.pad(slots, ((0, 0), (0, 0), (0, added), (0, 0)))

        return dataclasses.replace(self, layers=jax.tree.map(grow, self.layers))
