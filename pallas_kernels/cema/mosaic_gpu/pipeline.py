"""How the Hopper kernels walk over a split of a row: tiles through shared memory, token by token.

A warpgroup owns 128 channels of one split; thread i holds channel i of everything. Tiles of tokens
are copied ahead by the copy engine, results are copied back behind, forward or backward in time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHANNELS = 128
# Tokens; borders have a bit each in a word.
TILE = 32
# Tiles of every streamed array in shared memory.
BUFFERS = 2
# Tokens that are loaded ahead together (8 were no faster), and tokens of a group with a border.
UNROLL = 4
GROUP = 4
_LANES = plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1)

Lanes = Any  # float32 (CHANNELS,) in registers, one number per thread


class Place(NamedTuple):
    """The part of the arrays that a warpgroup works on; all traced int32 but `channels`.

    Attributes:
      row: row of the batch.
      block: block of channels.
      split: split of the row.
      channels: the block's channels.
      first: first tile.
      count: number of tiles.
    """

    row: Any
    block: Any
    split: Any
    channels: Any
    first: Any
    count: Any


class Borders(NamedTuple):
    """What a tile of a packed row says about its tokens, as bits of int32: bit t is token t.

    Attributes:
      starts: the token starts a document, so what lies before it is not seen.
      dead: the token is padding.
      event: index in the tile of the token where something leaves the row or enters it, or -1.
    """

    starts: Any
    dead: Any
    event: Any

    @property
    def is_plain(self) -> Any:
        """No token needs more than the recurrence."""
        return (self.starts == 0) & (self.dead == 0) & (self.event < 0)

    def is_plain_from(self, lowest: Any) -> Any:
        """The same of the GROUP tokens from `lowest` on."""
        bits = lax.shift_right_logical(self.starts | self.dead, lowest) & (2**GROUP - 1)
        return (bits == 0) & ((self.event < lowest) | (self.event >= lowest + GROUP))


def load(ref: Any, *index: Any) -> Lanes:
    """Channels of one row of a reference."""
    return plgpu.load(ref.at[index], layout=_LANES)


def load_rows(ref: Any, count: int, channels: Any) -> tuple[Lanes, ...]:
    """The first `count` rows of a (rows, channels) reference."""
    return tuple(load(ref, i, channels) for i in range(count))


def store_rows(ref: Any, channels: Any, values: Any) -> None:
    """The inverse of `load_rows`."""
    for i, value in enumerate(values):
        ref[i, channels] = value


def fill(value: float) -> Lanes:
    """The same number in all channels."""
    return plgpu.layout_cast(jnp.full((CHANNELS,), value, jnp.float32), _LANES)


def select(flag: Any, if_true: Lanes, if_false: Lanes) -> Lanes:
    """One of two, by a scalar: not even a NaN of the other gets through."""
    lanes = jnp.broadcast_to(jnp.where(flag, 1.0, 0.0), (CHANNELS,))
    return jnp.where(plgpu.layout_cast(lanes, _LANES) > 0.5, if_true, if_false)


def find_place(split: Any, tiles_per_split: int, tiles: int) -> Place:
    """The place of a split, of the row and channels that the grid ("d", "s", "b") says."""
    first = split * tiles_per_split
    count = jnp.minimum(tiles_per_split, tiles - first)
    block = lax.axis_index("d")
    channels = pl.ds(block * CHANNELS, CHANNELS)
    return Place(lax.axis_index("b"), block, split, channels, first, count)


class Stage(NamedTuple):
    """Shared memory of a warpgroup.

    Attributes:
      buffers: for every streamed array, BUFFERS tiles.
      barriers: one for every one of the BUFFERS.
    """

    buffers: tuple
    barriers: Any


def launch(
    kernel: Callable[..., None],
    operands: Any,
    out_type: Any,
    *,
    name: str,
    grid: tuple[int, int, int],
    staged: list[Any],
    arrivals: int,
    interpret: Any,
) -> Any:
    """Runs `kernel(split, stage, *operands, results)` in a warpgroup for every member of the grid.

    Args:
      kernel: what a warpgroup does.
      operands: arrays in global memory, in tuples; None stays None.
      out_type: shapes and dtypes of the results.
      name: what profiles call it.
      grid: blocks of channels, splits, rows.
      staged: dtypes of the streamed arrays.
      arrivals: copies that fill one set of buffers.
      interpret: `plgpu.InterpretGPUParams()` or None.
    """
    arrays, structure = jax.tree.flatten(operands)
    outs, out_structure = jax.tree.flatten(out_type)

    def body(*refs):
        inputs = jax.tree.unflatten(structure, refs[: len(arrays)])
        results = jax.tree.unflatten(out_structure, refs[len(arrays) : len(arrays) + len(outs)])
        *buffers, barriers = refs[len(arrays) + len(outs) :]
        kernel(lax.axis_index("s"), Stage(tuple(buffers), barriers), *inputs, results)

    body.__name__ = name

    results = plgpu.kernel(
        body,
        out_type=outs,
        grid=grid,
        grid_names=("d", "s", "b"),
        scratch_types=[
            *(plgpu.SMEM((BUFFERS, TILE, CHANNELS), dtype) for dtype in staged),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=BUFFERS),
        ],
        # The other semantics, the default of newer JAX, take minutes to infer what is fixed here.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(*arrays)
    return jax.tree.unflatten(out_structure, results)


def stream(
    place: Place,
    stage: Stage,
    sources: list[Any],
    targets: list[Any],
    carry: Any,
    run_tile: Callable[..., Any],
    *,
    backward: bool,
) -> Any:
    """Carries `carry` through `run_tile(tile, sources, targets, carry)` over the place's tiles.

    Args:
      place: where; its tiles run from the last to the first if `backward`.
      stage: buffers for the sources, then for the targets.
      sources: arrays (B, L, D) that are copied to shared memory ahead.
      targets: arrays (B, L, D) that are copied back behind.
      carry: the state before the first tile.
      run_tile: gets the tile's number and the slots of the buffers it reads and writes.
      backward: the direction of time.
    """
    last = place.first + place.count - 1

    def window(array, tile):
        return array.at[place.row, pl.ds(tile * TILE, TILE), place.channels]

    def barrier(slot):
        return stage.barriers.at[slot]

    def fetch(i):
        slot = lax.rem(i, BUFFERS)
        tile = last - i if backward else place.first + i
        for source, buffers in zip(sources, stage.buffers):
            plgpu.copy_gmem_to_smem(window(source, tile), buffers.at[slot], barrier(slot))

    for i in range(BUFFERS):
        pl.when(i < place.count)(partial(fetch, jnp.int32(i)))

    def body(i, carry):
        slot = lax.rem(i, BUFFERS)
        tile = last - i if backward else place.first + i
        plgpu.barrier_wait(barrier(slot))
        if targets:
            plgpu.wait_smem_to_gmem(BUFFERS - 1, wait_read_only=True)
        slots = [buffers.at[slot] for buffers in stage.buffers]
        written = slots[len(sources) :]
        carry = run_tile(tile, slots[: len(sources)], written, carry)
        plgpu.commit_smem()
        for target, slot_of_target in zip(targets, written, strict=True):
            plgpu.copy_smem_to_gmem(slot_of_target, window(target, tile))
        pl.when(i + BUFFERS < place.count)(partial(fetch, i + BUFFERS))
        return carry

    return lax.fori_loop(0, place.count, body, carry)


class Walk(NamedTuple):
    """How a tile's tokens are gone through.

    Attributes:
      read: tiles in shared memory that are read.
      written: tiles that are written.
      step: `step(carry, tokens) -> (carry, results)` with a list of successive tokens for every
        tile read, in the order of the walk, and such lists of results for every tile written.
      tokens: tokens of a step; a step must be able to take a single one too.
      backward: the direction of time.
    """

    read: list[Any]
    written: list[Any]
    step: Callable[[Any, list[list[Lanes]]], tuple[Any, list[list[Lanes]]]]
    tokens: int
    backward: bool

    def position(self, i: Any) -> Any:
        """Index in the tile of the walk's i-th token."""
        return TILE - 1 - i if self.backward else i

    def load_group(self, first: Any, count: int) -> list[list[Lanes]]:
        """Some tokens of every tile read."""
        group = range(count)
        return [[load(ref, self.position(first + u)) for u in group] for ref in self.read]

    def advance_group(self, first: Any, carry: Any, group: list[list[Lanes]]) -> Any:
        """Takes the steps through a loaded group."""
        group = [[token.astype(jnp.float32) for token in tokens] for tokens in group]
        for u in range(0, len(group[0]), self.tokens):
            carry, results = self.step(carry, [tokens[u : u + self.tokens] for tokens in group])
            for ref, values in zip(self.written, results, strict=True):
                for v, value in enumerate(values):
                    ref[self.position(first + u + v)] = value.astype(ref.dtype)
        return carry

    def through_tile(self, carry: Any) -> Any:
        """The way through a tile without borders."""

        def body(i, state):
            carry, group = state
            first = i * UNROLL
            # The next tokens are on their way while these are worked on.
            after = self.load_group(lax.min(first + UNROLL, TILE - UNROLL), UNROLL)
            return self.advance_group(first, carry, group), after

        state = carry, self.load_group(jnp.int32(0), UNROLL)
        return lax.fori_loop(0, TILE // UNROLL, body, state)[0]

    def through_borders(
        self,
        carry: Any,
        borders: Borders,
        restart: Callable[[Any, Any], Any],
        event: Callable[[Any], None] | None,
    ) -> Any:
        """The way through a tile with borders: token by token in the groups that have one.

        Padding is read as zero and gives zero. Where a document starts, `restart(position, carry)`
        runs before the token, or after it if backward; `event(carry)` follows the event's token,
        before a restart.
        """

        def take_token(i, carry):
            position = self.position(i)
            starts = (lax.shift_right_logical(borders.starts, position) & 1) == 1
            live = (lax.shift_right_logical(borders.dead, position) & 1) == 0

            def restarted(carry):
                return lax.cond(starts, partial(restart, position), lambda carry: carry, carry)

            if not self.backward:
                carry = restarted(carry)
            tokens = [load(ref, position).astype(jnp.float32) for ref in self.read]
            tokens = [[select(live, token, jnp.zeros_like(token))] for token in tokens]
            carry, results = self.step(carry, tokens)
            for ref, (value,) in zip(self.written, results, strict=True):
                ref[position] = select(live, value, jnp.zeros_like(value)).astype(ref.dtype)
            if event is not None:
                pl.when(borders.event == position)(partial(event, carry))
            return restarted(carry) if self.backward else carry

        def body(i, carry):
            first = i * GROUP
            lowest = self.position(first + GROUP - 1) if self.backward else first

            def plain(carry):
                return self.advance_group(first, carry, self.load_group(first, GROUP))

            def bordered(carry):
                return lax.fori_loop(first, first + GROUP, take_token, carry)

            return lax.cond(borders.is_plain_from(lowest), plain, bordered, carry)

        return lax.fori_loop(0, TILE // GROUP, body, carry)
