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
TILE = 32
BUFFERS = 2
UNROLL = 2
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


def load(ref: Any, *index: Any) -> Lanes:
    """Channels of one row of a reference."""
    return plgpu.load(ref.at[index], layout=_LANES)


def load_rows(ref: Any, first: Any, count: int, channels: Any) -> tuple[Lanes, ...]:
    """`count` rows of a (rows, channels) reference."""
    return tuple(load(ref, first + i, channels) for i in range(count))


def store_rows(ref: Any, first: int, channels: Any, values: Any) -> None:
    """The inverse of `load_rows`."""
    for i, value in enumerate(values):
        ref[first + i, channels] = value


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
    """A warpgroup's own part of shared memory.

    Attributes:
      buffers: for every streamed array, BUFFERS tiles.
      barriers: of all warpgroups.
      first_barrier: the first of the BUFFERS barriers of this one.
    """

    buffers: tuple
    barriers: Any
    first_barrier: Any


def launch(
    kernel: Callable[..., None],
    operands: Any,
    out_type: Any,
    *,
    grid: tuple[int, int, int],
    warpgroups: int,
    staged: list[Any],
    arrivals: int,
    interpret: Any,
) -> Any:
    """Runs `kernel(split, stage, *operands, results)` in a warpgroup for every member of the grid.

    Args:
      kernel: what a warpgroup does.
      operands: arrays in global memory, in tuples; None stays None.
      out_type: shapes and dtypes of the results.
      grid: blocks of channels, splits, rows.
      warpgroups: warpgroups of a block of threads, each with its own split. Their number caps the
        registers of a thread: 4 leave 128, 2 leave 255.
      staged: dtypes of the streamed arrays.
      arrivals: copies that fill one set of buffers.
      interpret: `plgpu.InterpretGPUParams()` or None.
    """
    blocks, splits, rows = grid
    arrays, structure = jax.tree.flatten(operands)
    outs, out_structure = jax.tree.flatten(out_type)

    def body(*refs):
        warpgroup = lax.axis_index("w")
        split = lax.axis_index("s") * warpgroups + warpgroup
        inputs = jax.tree.unflatten(structure, refs[: len(arrays)])
        results = jax.tree.unflatten(out_structure, refs[len(arrays) : len(arrays) + len(outs)])
        *buffers, barriers = refs[len(arrays) + len(outs) :]
        own = tuple(ref.at[warpgroup] for ref in buffers)
        stage = Stage(own, barriers, warpgroup * BUFFERS)
        pl.when(split < splits)(lambda: kernel(split, stage, *inputs, results))

    results = plgpu.kernel(
        body,
        out_type=outs,
        grid=(blocks, -(-splits // warpgroups), rows),
        grid_names=("d", "s", "b"),
        num_threads=warpgroups,
        thread_name="w",
        scratch_types=[
            *(plgpu.SMEM((warpgroups, BUFFERS, TILE, CHANNELS), dtype) for dtype in staged),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=warpgroups * BUFFERS),
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
        return stage.barriers.at[stage.first_barrier + slot]

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


def walk(
    read: list[Any],
    written: list[Any],
    carry: Any,
    step: Callable[[Any, list[Lanes]], tuple[Any, list[Lanes]]],
    *,
    backward: bool,
) -> Any:
    """`step(carry, tokens) -> (carry, results)` over a tile without borders."""

    def position(i):
        return TILE - 1 - i if backward else i

    def load_ahead(first):
        return tuple(tuple(load(ref, position(first + u)) for ref in read) for u in range(UNROLL))

    def body(i, state):
        carry, ahead = state
        first = i * UNROLL
        # The next tokens are on their way while these are worked on.
        after = load_ahead(lax.min(first + UNROLL, TILE - UNROLL))
        for u, tokens in enumerate(ahead):
            carry, results = step(carry, [token.astype(jnp.float32) for token in tokens])
            for ref, value in zip(written, results, strict=True):
                ref[position(first + u)] = value.astype(ref.dtype)
        return carry, after

    return lax.fori_loop(0, TILE // UNROLL, body, (carry, load_ahead(jnp.int32(0))))[0]


def walk_with_borders(
    read: list[Any],
    written: list[Any],
    carry: Any,
    step: Callable[[Any, list[Lanes]], tuple[Any, list[Lanes]]],
    borders: Borders,
    *,
    restart: Callable[[Any, Any], Any],
    event: Callable[[Any], None] | None,
    backward: bool,
) -> Any:
    """`walk` over a tile with borders.

    Padding is read as zero and gives zero. Where a document starts, `restart(position, carry)` runs
    before the token, or after it if `backward`; `event(carry)` follows the event's token, before a
    restart.
    """

    def body(i, carry):
        position = TILE - 1 - i if backward else i
        starts = (lax.shift_right_logical(borders.starts, position) & 1) == 1
        live = (lax.shift_right_logical(borders.dead, position) & 1) == 0

        def restarted(carry):
            return lax.cond(starts, partial(restart, position), lambda carry: carry, carry)

        if not backward:
            carry = restarted(carry)
        tokens = [load(ref, position).astype(jnp.float32) for ref in read]
        carry, results = step(carry, [select(live, a, jnp.zeros_like(a)) for a in tokens])
        for ref, value in zip(written, results, strict=True):
            ref[position] = select(live, value, jnp.zeros_like(value)).astype(ref.dtype)
        if event is not None:
            pl.when(borders.event == position)(partial(event, carry))
        return restarted(carry) if backward else carry

    return lax.fori_loop(0, TILE, body, carry)
