"""The loop over the tokens of a tile, with a slow path for tiles that have document boundaries."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.cema.mosaic_gpu.layout import CemaWorkItem, Lanes, load, select
from pallas_kernels.cema.row_splits.types import TILE

# Tokens that are loaded ahead together; 8 were no faster.
UNROLL = 4
# Tokens of a group on the slow path; groups without a boundary take the fast loop body.
GROUP = 4


class TileBoundaries(NamedTuple):
    """Document boundaries of a tile, as bits of an int32: bit t is token t.

    Attributes:
      starts: the token starts a document: the state resets before it.
      padding: the token is padding.
      capture: index in the tile of the row's first or last token, whose state is stored, or -1.
    """

    starts: Any
    padding: Any
    capture: Any

    @property
    def is_plain(self) -> Any:
        """Whether every token of the tile is an ordinary one."""
        return (self.starts == 0) & (self.padding == 0) & (self.capture < 0)

    def is_plain_from(self, lowest: Any) -> Any:
        """Whether the GROUP tokens from `lowest` on are ordinary ones."""
        bits = lax.shift_right_logical(self.starts | self.padding, lowest) & (2**GROUP - 1)
        return (bits == 0) & ((self.capture < lowest) | (self.capture >= lowest + GROUP))


class TileIterator(NamedTuple):
    """Iterates over the tokens of one tile.

    Attributes:
      read: tiles in shared memory that are read.
      written: tiles in shared memory that are written.
      step: `step(carry, tokens) -> (carry, results)`; tokens has a list of successive tokens for
        every tile read, in the order of the iteration, results such a list for every tile written.
      tokens_per_step: tokens of a step; a step must accept a single one too.
      backward: from the last token to the first.
    """

    read: list[Any]
    written: list[Any]
    step: Callable[[Any, list[list[Lanes]]], tuple[Any, list[list[Lanes]]]]
    tokens_per_step: int
    backward: bool

    def position(self, i: Any) -> Any:
        """Index in the tile of the i-th token of the iteration."""
        return TILE - 1 - i if self.backward else i

    def load_group(self, first: Any, count: int) -> list[list[Lanes]]:
        """`count` tokens of every tile read."""
        group = range(count)
        return [[load(ref, self.position(first + u)) for u in group] for ref in self.read]

    def run_group(self, first: Any, carry: Any, group: list[list[Lanes]]) -> Any:
        """Steps through a loaded group."""
        group = [[token.astype(jnp.float32) for token in tokens] for tokens in group]
        for u in range(0, len(group[0]), self.tokens_per_step):
            step_tokens = [tokens[u : u + self.tokens_per_step] for tokens in group]
            carry, results = self.step(carry, step_tokens)
            for ref, values in zip(self.written, results, strict=True):
                for v, value in enumerate(values):
                    ref[self.position(first + u + v)] = value.astype(ref.dtype)
        return carry

    def run(self, carry: Any) -> Any:
        """Steps through a tile without boundaries."""

        def body(i, state):
            carry, group = state
            first = i * UNROLL
            # Load the next group before this one's arithmetic, to hide the latency.
            next_group = self.load_group(lax.min(first + UNROLL, TILE - UNROLL), UNROLL)
            return self.run_group(first, carry, group), next_group

        state = carry, self.load_group(jnp.int32(0), UNROLL)
        return lax.fori_loop(0, TILE // UNROLL, body, state)[0]

    def run_with_boundaries(
        self,
        carry: Any,
        boundaries: TileBoundaries,
        reset: Callable[[Any, Any], Any],
        capture: Callable[[Any], None] | None,
    ) -> Any:
        """Steps through a tile token by token, but for groups without a boundary.

        Padding is read as zero, and its results are zero. Where a document starts,
        `reset(position, carry)` runs before the token, or after it if backward. `capture(carry)`
        runs after the token `boundaries.capture`, before a reset.
        """

        def run_token(i, carry):
            position = self.position(i)
            starts = (lax.shift_right_logical(boundaries.starts, position) & 1) == 1
            is_token = (lax.shift_right_logical(boundaries.padding, position) & 1) == 0

            def reset_at_start(carry):
                return lax.cond(starts, partial(reset, position), lambda carry: carry, carry)

            if not self.backward:
                carry = reset_at_start(carry)
            tokens = [load(ref, position).astype(jnp.float32) for ref in self.read]
            tokens = [[select(is_token, token, jnp.zeros_like(token))] for token in tokens]
            carry, results = self.step(carry, tokens)
            for ref, (value,) in zip(self.written, results, strict=True):
                ref[position] = select(is_token, value, jnp.zeros_like(value)).astype(ref.dtype)
            if capture is not None:
                pl.when(boundaries.capture == position)(partial(capture, carry))
            return reset_at_start(carry) if self.backward else carry

        def body(i, carry):
            first = i * GROUP
            lowest = self.position(first + GROUP - 1) if self.backward else first

            def plain(carry):
                return self.run_group(first, carry, self.load_group(first, GROUP))

            def with_boundary(carry):
                return lax.fori_loop(first, first + GROUP, run_token, carry)

            return lax.cond(boundaries.is_plain_from(lowest), plain, with_boundary, carry)

        return lax.fori_loop(0, TILE // GROUP, body, carry)


def make_run_tile(
    documents: Any,
    work: CemaWorkItem,
    step: Callable[..., Any],
    reset: Callable[[Any, Any, Any], Any],
    *,
    tokens_per_step: int = 1,
    capture: Callable[[Any], None] | None = None,
    capture_at: int | None = None,
    backward: bool,
) -> Callable[..., Any]:
    """The `run_tile` of `stream_tiles`.

    Args:
      documents: references of `CemaDocuments`, or None.
      work: row and channels.
      step: as in `TileIterator`.
      reset: `reset(tile, position, carry)`, the carry at the start of a document.
      tokens_per_step: tokens of a step where there are no boundaries.
      capture: stores the carry at the row's first or last token.
      capture_at: 0 for the row's first token, 1 for its last.
      backward: from the last token to the first.
    """

    def find_boundaries(tile):
        position = jnp.int32(-1)
        if capture_at is not None:
            offset = documents.row_ends[work.row, capture_at] - tile * TILE
            position = jnp.where((offset >= 0) & (offset < TILE), offset, -1)
        bits = documents.boundary_bits
        return TileBoundaries(bits[work.row, tile, 0], bits[work.row, tile, 1], position)

    def run_tile(tile, read, written, carry):
        iterator = TileIterator(read, written, step, tokens_per_step, backward)
        if documents is None:
            return iterator.run(carry)
        boundaries = find_boundaries(tile)
        run_with_boundaries = partial(
            iterator.run_with_boundaries,
            boundaries=boundaries,
            reset=partial(reset, tile),
            capture=capture,
        )
        return lax.cond(boundaries.is_plain, iterator.run, run_with_boundaries, carry)

    return run_tile
