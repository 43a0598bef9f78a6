"""Documents of a row as seen by blocks of T tokens.

A block is cut into pieces wherever the segment id changes, padding being a piece of its own. Only a
block's first piece may see the state before the block, only its last piece reaches the state after
it, and inside the block a token sees its own piece alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


class Pieces(NamedTuple):
    """Pieces of the J blocks of every row, J T = the length padded to whole blocks.

    Attributes:
      index: number of the token's piece in its block; 0 continues the block before.
      age: tokens of the same piece before this one in its block.
      is_token: not padding.
    """

    index: Int32[Array, "B J T"]
    age: Int32[Array, "B J T"]
    is_token: Bool[Array, "B J T"]

    @property
    def in_first(self) -> Bool[Array, "B J T"]:
        """Tokens that see the state before the block."""
        return self.is_token & (self.index == 0)

    @property
    def in_last(self) -> Bool[Array, "B J T"]:
        """Tokens that reach the state after the block."""
        return self.is_token & (self.index == self.index[..., -1:])

    @property
    def is_whole(self) -> Bool[Array, "B J"]:
        """Blocks that hand the state before them on."""
        return self.index[..., -1] == 0


class RowEnd(NamedTuple):
    """Where each row's last token is; all zero for a row of padding.

    Attributes:
      position: index of the row's last token.
      length: tokens of its piece up to and including it.
      sees_carry: its piece is the first of its block.
    """

    position: Int32[Array, " B"]
    length: Int32[Array, " B"]
    sees_carry: Bool[Array, " B"]


def cut_into_pieces(segment_ids: Int32[Array, "B L"], block_size: int) -> Pieces:
    """Pieces of blocks of `block_size` tokens; the row is padded at its end to whole blocks."""
    rows, length = segment_ids.shape
    padded = jnp.pad(segment_ids, ((0, 0), (0, -length % block_size)))
    changes = jnp.pad(padded[:, 1:] != padded[:, :-1], ((0, 0), (1, 0)))
    changes = changes.reshape(rows, -1, block_size)
    position = jnp.arange(block_size, dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(changes, position, 0), axis=2)
    return Pieces(
        index=jnp.cumsum(changes, axis=2, dtype=jnp.int32),
        age=position - start,
        is_token=(padded != 0).reshape(rows, -1, block_size),
    )


def count_leading_padding(segment_ids: Int32[Array, "B L"]) -> Int32[Array, " B"]:
    """Padding tokens before each row's first token; 0 for a row of padding."""
    return jnp.argmax(segment_ids != 0, axis=1).astype(jnp.int32)


def rotate_rows(a: Array, lead: Int32[Array, " B"]) -> Array:
    """Moves the first `lead` tokens of every row to its end; back again with -lead."""
    index = (jnp.arange(a.shape[1], dtype=jnp.int32) + lead[:, None]) % a.shape[1]
    return jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - 2)), axis=1)


def find_row_ends(pieces: Pieces) -> RowEnd:
    """The last token of every row."""
    rows = pieces.index.shape[0]
    flat = pieces.is_token.reshape(rows, -1)
    position = jnp.where(flat, jnp.arange(flat.shape[1], dtype=jnp.int32), 0).max(axis=1)

    def at_end(a: Array) -> Array:
        return jnp.take_along_axis(a.reshape(rows, -1), position[:, None], axis=1)[:, 0]

    return RowEnd(position, at_end(pieces.age) + 1, at_end(pieces.index) == 0)
