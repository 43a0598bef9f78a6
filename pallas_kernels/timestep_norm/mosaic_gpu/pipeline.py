"""How the Hopper kernels hold and move a tile: 128 tokens of a group or some, in a warpgroup.

Numbers of a token and a feature stand in the layout of wgmma, where four threads share a row. What
there is one of per token stands in `LANES`, one token a thread. Both meet in shared memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TOKENS = 128
# Tokens that are in registers at once.
HALF = 64
# Tiles of every streamed array in shared memory.
BUFFERS = 2
LANES = plgpu.Layout.WG_STRIDED((TOKENS,), vec_size=1)
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
# Running sums look so far to either side.
_PAD = 64
_SHIFTS = ((1, 2, 3), (4, 8, 12), (16, 32, 48), (64,))

Array = Any  # float32 in registers


class Geometry(NamedTuple):
    """Static sizes of a call.

    Attributes:
      rows: B.
      tiles: of a row.
      tiles_per_split: of every split but the last, which may be shorter.
      groups: G.
      together: groups of a block.
      features: of a group.
      width: features with those that fill the group up.
    """

    rows: int
    tiles: int
    tiles_per_split: int
    groups: int
    together: int
    features: int
    width: int

    @property
    def splits(self) -> int:
        """Splits of a row."""
        return -(-self.tiles // self.tiles_per_split)

    @property
    def block_width(self) -> int:
        """Features of a block."""
        return self.together * self.width


class Place(NamedTuple):
    """What a warpgroup works on.

    Attributes:
      row: row of the batch.
      split: split of the row.
      groups: the groups.
      first: first tile.
      count: number of tiles.
      columns: the groups' features.
    """

    row: Any
    split: Any
    groups: list[Any]
    first: Any
    count: Any
    columns: Any

    def window(self, array: Any, tile: Any) -> Any:
        """A tile of (B, L, D)."""
        return array.at[self.row, pl.ds(tile * TOKENS, TOKENS), self.columns]


def find_place(geometry: Geometry, first_split: int = 0) -> Place:
    """The place that the grid ("g", "s", "b") says; the grid's splits begin at `first_split`."""
    split = lax.axis_index("s") + first_split
    first = split * geometry.tiles_per_split
    block = lax.axis_index("g")
    return Place(
        row=lax.axis_index("b"),
        split=split,
        groups=[block * geometry.together + i for i in range(geometry.together)],
        first=first,
        count=jnp.minimum(geometry.tiles_per_split, geometry.tiles - first),
        columns=pl.ds(block * geometry.block_width, geometry.block_width),
    )


def staged(geometry: Geometry, dtype: Any) -> Any:
    """Shared memory for tiles of (B, L, D), in which threads meet no two in a bank."""
    size = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if geometry.block_width * size % s == 0)
    transforms: Any = (
        plgpu.TilingTransform((8, swizzle // size)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    shape = BUFFERS, 1, TOKENS, geometry.block_width
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load_half(ref: Any, half: int) -> Array:
    """64 tokens of a tile as float32."""
    rows = ref.at[0, pl.ds(half * HALF, HALF)]
    return plgpu.load(rows, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def load_rows(ref: Any, half: int) -> Array:
    """A number for each of 64 tokens of a (128,) reference."""
    return plgpu.load(ref.at[pl.ds(half * HALF, HALF)], layout=ROWS, optimized=False)


def load_lanes(ref: Any) -> Array:
    """A number for each of 128 tokens."""
    return plgpu.load(ref, layout=LANES)


def load_columns(ref: Any, columns: Any) -> Array:
    """A number for each feature."""
    return plgpu.load(ref.at[columns], layout=COLUMNS, optimized=False)


def over_columns(groups: list[Array], width: int) -> Array:
    """A number of each token and group, at all the group's features."""
    parts = [lax.broadcast_in_dim(rows, (HALF, width), [0]) for rows in groups]
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, 1)


def sum_groups(v: Array, width: int) -> list[Array]:
    """Sums over the features of each group."""
    starts = range(0, v.shape[1], width)
    return [lax.slice(v, (0, start), (HALF, start + width)).sum(axis=1) for start in starts]


def over_rows(columns: Array) -> Array:
    """A number of each feature, at all tokens."""
    return lax.broadcast_in_dim(columns, (HALF, *columns.shape), [1])


def fill(shape: tuple[int, ...], layout: Any) -> Array:
    """Zeros."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def lane_index() -> Array:
    """Index of the token in its tile."""
    return plgpu.broadcasted_iota(jnp.int32, (TOKENS,), 0, layout=LANES)


def meet() -> None:
    """All threads see what each has stored to shared memory."""
    plgpu.commit_smem()


def clear(sums: Any) -> None:
    """Zeros around what `running_sums` writes; they are never written again."""
    for buffer in range(sums.shape[0]):
        for i in range(sums.shape[1]):
            for start in range(0, sums.shape[2], TOKENS):
                sums[buffer, i, pl.ds(start, TOKENS)] = fill((TOKENS,), LANES)
    meet()


def sums_memory(count: int) -> Any:
    """Shared memory of `running_sums` of at most `count` arrays."""
    return plgpu.SMEM((2, count, TOKENS + 2 * _PAD), jnp.float32)


def running_sums(
    memory: Any, values: list[Array], distance: Array | None, *, backward: bool
) -> list[Array]:
    """Inclusive sums over a tile's tokens, of several arrays at once.

    Args:
      memory: `sums_memory`, cleared.
      values: a number of every token.
      distance: tokens between this one and its document's first one, or last one if backward; None
        if the tile is one document's. Nothing else is let through, not even by a product with 0.
      backward: sums from the tile's end.
    """
    for step, shifts in enumerate(_SHIFTS):
        # In turns, so that one barrier a step is enough.
        buffer = memory.at[step % 2]
        for i, value in enumerate(values):
            buffer[i, pl.ds(_PAD, TOKENS)] = value
        meet()
        sums = []
        for i, value in enumerate(values):
            for shift in shifts:
                start = _PAD + shift if backward else _PAD - shift
                other = load_lanes(buffer.at[i, pl.ds(start, TOKENS)])
                if distance is not None:
                    other = jnp.where(distance >= shift, other, jnp.zeros_like(other))
                value = value + other
            sums.append(value)
        values = sums
    return values


class Stage(NamedTuple):
    """Shared memory through which arrays are streamed.

    Attributes:
      read: slots of every array read.
      written: slots of every array written.
      barriers: one for every slot.
    """

    read: list[Any]
    written: list[Any]
    barriers: Any


def stream(
    place: Place,
    stage: Stage,
    sources: Callable[[Any], list[list[Any]]],
    targets: Callable[[Any], list[list[Any]]],
    carry: Any,
    run_tile: Callable[..., Any],
    *,
    backward: bool,
) -> Any:
    """Carries `carry` through `run_tile(tile, read, written, carry)` over the place's tiles.

    Args:
      place: where; its tiles run from the last to the first if `backward`.
      stage: shared memory.
      sources: for a tile, what is copied to each part of each array read.
      targets: for a tile, where each part of each array written is copied to.
      carry: what the first tile gets.
      run_tile: gets the tile's number and the slots that it reads and writes.
      backward: the direction of time.
    """
    last = place.first + place.count - 1

    def find_tile(i):
        return last - i if backward else place.first + i

    def fetch(i):
        slot = lax.rem(i, BUFFERS)
        for parts, buffer in zip(sources(find_tile(i)), stage.read, strict=True):
            for part, source in enumerate(parts):
                plgpu.copy_gmem_to_smem(source, buffer.at[slot, part], stage.barriers.at[slot])

    for i in range(BUFFERS):
        pl.when(i < place.count)(partial(fetch, jnp.int32(i)))

    def body(i, carry):
        slot = lax.rem(i, BUFFERS)
        tile = find_tile(i)
        plgpu.barrier_wait(stage.barriers.at[slot])
        if stage.written:
            plgpu.wait_smem_to_gmem(BUFFERS - 1, wait_read_only=True)
        written = [buffer.at[slot] for buffer in stage.written]
        carry = run_tile(tile, [buffer.at[slot] for buffer in stage.read], written, carry)
        plgpu.commit_smem()
        copies = [
            (buffer.at[part], target)
            for parts, buffer in zip(targets(tile), written, strict=True)
            for part, target in enumerate(parts)
        ]
        for number, (buffer, target) in enumerate(copies):
            is_last = number + 1 == len(copies)
            plgpu.copy_smem_to_gmem(buffer, target, commit_group=is_last)
        pl.when(i + BUFFERS < place.count)(partial(fetch, i + BUFFERS))
        return carry

    carry = lax.fori_loop(0, place.count, body, carry)
    if stage.written:
        plgpu.wait_smem_to_gmem(0)
    return carry


def launch(
    kernel: Callable[..., None],
    operands: Any,
    out_type: Any,
    *,
    name: str,
    grid: tuple[int, int, int],
    scratch: Any,
    interpret: Any,
) -> Any:
    """Runs `kernel(operands, results, scratch)` in a warpgroup for every member of the grid.

    Args:
      kernel: what a warpgroup does.
      operands: a tree of arrays.
      out_type: a tree of shapes and dtypes.
      name: what profiles call it.
      grid: blocks of groups, splits, rows.
      scratch: a tree of shared memory and barriers.
      interpret: `plgpu.InterpretGPUParams()` or None.
    """
    arrays, structure = jax.tree.flatten(operands)
    outs, out_structure = jax.tree.flatten(out_type)
    memories, memory_structure = jax.tree.flatten(scratch)

    def body(*refs):
        inputs = jax.tree.unflatten(structure, refs[: len(arrays)])
        results = jax.tree.unflatten(out_structure, refs[len(arrays) : len(arrays) + len(outs)])
        kernel(inputs, results, jax.tree.unflatten(memory_structure, refs[len(arrays + outs) :]))

    body.__name__ = name
    results = plgpu.kernel(
        body,
        out_type=outs,
        grid=grid,
        grid_names=("g", "s", "b"),
        scratch_types=memories,
        # The other semantics, the default of newer JAX, take minutes to infer what is fixed here.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(*arrays)
    return jax.tree.unflatten(out_structure, results)
