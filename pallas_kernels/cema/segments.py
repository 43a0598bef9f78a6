"""Documents of a row as seen by blocks of T tokens.

A segment piece is a run of tokens with one segment id inside one block; padding is a piece too. The
first piece of a block continues the state before the block, the last piece determines the state
after it, and inside the block a token depends on earlier tokens of its own piece only.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


class SegmentPieces(NamedTuple):
    """Segment pieces of the J blocks of every row, J T = the length padded to whole blocks.

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
        """Tokens that depend on the state before the block."""
        return self.is_token & (self.index == 0)

    @property
    def in_last(self) -> Bool[Array, "B J T"]:
        """Tokens that the state after the block depends on."""
        return self.is_token & (self.index == self.index[..., -1:])

    @property
    def passes_state_through(self) -> Bool[Array, "B J"]:
        """Blocks of a single piece: the state after them depends on the state before them."""
        return self.index[..., -1] == 0


class RowEnd(NamedTuple):
    """Each row's last token; all zero for a row of padding.

    Attributes:
      position: index of the row's last token.
      length: tokens of its piece up to and including it.
      in_first: its piece is the first of its block.
    """

    position: Int32[Array, " B"]
    length: Int32[Array, " B"]
    in_first: Bool[Array, " B"]


def find_segment_pieces(segment_ids: Int32[Array, "B L"], block_size: int) -> SegmentPieces:
    """The pieces in blocks of `block_size` tokens; rows are right-padded to whole blocks."""
    rows, length = segment_ids.shape
    padded = jnp.pad(segment_ids, ((0, 0), (0, -length % block_size)))
    changes = jnp.pad(padded[:, 1:] != padded[:, :-1], ((0, 0), (1, 0)))
    changes = changes.reshape(rows, -1, block_size)
    position = jnp.arange(block_size, dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(changes, position, 0), axis=2)
    return SegmentPieces(
        index=jnp.cumsum(changes, axis=2, dtype=jnp.int32),
        age=position - start,
        is_token=(padded != 0).reshape(rows, -1, block_size),
    )


def find_row_ends(segment_pieces: SegmentPieces) -> RowEnd:
    """The last token of every row."""
    rows = segment_pieces.index.shape[0]
    flat = segment_pieces.is_token.reshape(rows, -1)
    position = jnp.where(flat, jnp.arange(flat.shape[1], dtype=jnp.int32), 0).max(axis=1)

    def at_end(a: Array) -> Array:
        return jnp.take_along_axis(a.reshape(rows, -1), position[:, None], axis=1)[:, 0]

    return RowEnd(position, at_end(segment_pieces.age) + 1, at_end(segment_pieces.index) == 0)


def take_last_pieces(
    x: Float[Array, "B L D"], segment_pieces: SegmentPieces, end: RowEnd, dtype: Any
) -> tuple[Float[Array, "B T D"], Bool[Array, "B 1"]]:
    """Each row's last piece, right-aligned in a block with zeros before it.

    Args:
      x: the rows, with at least as many tokens as the last piece's end.
      segment_pieces: of x.
      end: from `find_row_ends`.
      dtype: of the result.

    Returns:
      The blocks, and whether the row has tokens.
    """
    block_size = segment_pieces.index.shape[2]
    offset = jnp.arange(block_size, dtype=jnp.int32)
    index = jnp.maximum(end.position[:, None] - (block_size - 1) + offset, 0)
    tail = jnp.take_along_axis(x, index[..., None], axis=1).astype(dtype)
    has_tokens = segment_pieces.is_token.any(axis=(1, 2))[:, None]
    is_in_piece = (offset >= block_size - end.length[:, None]) & has_tokens
    return jnp.where(is_in_piece[..., None], tail, 0), has_tokens


def count_left_padding(segment_ids: Int32[Array, "B L"]) -> Int32[Array, " B"]:
    """Padding tokens before each row's first token; 0 for a row of padding."""
    return jnp.argmax(segment_ids != 0, axis=1).astype(jnp.int32)


def rotate_rows(a: Array, shift: Int32[Array, " B"]) -> Array:
    """Moves the first `shift` tokens of every row to its end; the inverse takes -shift."""
    index = (jnp.arange(a.shape[1], dtype=jnp.int32) + shift[:, None]) % a.shape[1]
    return jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - 2)), axis=1)
