"""Streams tiles of a row's split between global memory and a warpgroup's shared memory."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.timestep_norm.row_splits.types import TILE, TimestepNormGeometry

# Tiles of every streamed array in shared memory.
NUM_STAGES = 2


class WorkItem(NamedTuple):
    """Tiles, channels and rows of one warpgroup.

    Attributes:
      row: row of the batch.
      split: split of the row.
      groups: groups of the block.
      first_tile: first tile of the split.
      num_tiles: tiles of the split.
      columns: features of the groups.
    """

    row: Any
    split: Any
    groups: list[Any]
    first_tile: Any
    num_tiles: Any
    columns: Any

    def sequence_slice(self, array: Any, tile: Any) -> Any:
        """A tile of (B, L, D)."""
        return array.at[self.row, pl.ds(tile * TILE, TILE), self.columns]


def find_work_item(geometry: TimestepNormGeometry, first_split: int = 0) -> WorkItem:
    """The work item of a block of the grid ("g", "s", "b"); its splits begin at `first_split`."""
    split = lax.axis_index("s") + first_split
    first_tile = split * geometry.tiles_per_split
    block = lax.axis_index("g")
    return WorkItem(
        row=lax.axis_index("b"),
        split=split,
        groups=[block * geometry.groups_per_block + i for i in range(geometry.groups_per_block)],
        first_tile=first_tile,
        num_tiles=jnp.minimum(geometry.tiles_per_split, geometry.tiles - first_tile),
        columns=pl.ds(block * geometry.block_width, geometry.block_width),
    )


def tile_buffers(geometry: TimestepNormGeometry, dtype: Any) -> Any:
    """Shared memory for tiles of (B, L, D), swizzled so that loads have no bank conflicts."""
    size = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if geometry.block_width * size % s == 0)
    transforms: Any = (
        plgpu.TilingTransform((8, swizzle // size)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    shape = NUM_STAGES, 1, TILE, geometry.block_width
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class StageBuffers(NamedTuple):
    """Shared memory of the pipeline; axis 0 of every buffer is the stage.

    Attributes:
      inputs: NamedTuple with a buffer for every operand; None for absent ones.
      output: buffer of the result; None in kernels that only summarize.
      barriers: one for every stage, completed when all its copies have arrived.
    """

    inputs: Any
    output: Any
    barriers: Any


def stream(
    work: WorkItem,
    stage: StageBuffers,
    input_slices: Callable[[Any], Any],
    output_slice: Callable[[Any], Any] | None,
    carry: Any,
    run_tile: Callable[..., Any],
    *,
    reverse: bool,
) -> Any:
    """Runs `carry = run_tile(tile, tiles_smem, output_smem, carry)` over a split's tiles.

    Tiles are copied by TMA `NUM_STAGES` ahead.

    Args:
      work: the work item.
      stage: shared memory.
      input_slices: of a tile, lists of slices of global memory in the structure of `stage.inputs`.
      output_slice: of a tile, where the result is copied to; None without a result.
      carry: what the first tile receives.
      run_tile: receives the tile's index in its row, its buffers and the result's buffer.
      reverse: from the last tile to the first.
    """
    last_tile = work.first_tile + work.num_tiles - 1

    def tile_index(i):
        return last_tile - i if reverse else work.first_tile + i

    def fetch(i):
        slot = lax.rem(i, NUM_STAGES)
        for slices, buffer in zip(input_slices(tile_index(i)), stage.inputs, strict=True):
            for j, source in enumerate(slices or ()):
                plgpu.copy_gmem_to_smem(source, buffer.at[slot, j], stage.barriers.at[slot])

    for i in range(NUM_STAGES):
        pl.when(i < work.num_tiles)(partial(fetch, jnp.int32(i)))

    def body(i, carry):
        slot = lax.rem(i, NUM_STAGES)
        tile = tile_index(i)
        plgpu.barrier_wait(stage.barriers.at[slot])
        output_smem: Any = None
        if output_slice is not None:
            plgpu.wait_smem_to_gmem(NUM_STAGES - 1, wait_read_only=True)
            output_smem = stage.output.at[slot]
        tiles_smem = [None if buffer is None else buffer.at[slot] for buffer in stage.inputs]
        carry = run_tile(tile, type(stage.inputs)(*tiles_smem), output_smem, carry)
        plgpu.commit_smem()
        if output_slice is not None:
            plgpu.copy_smem_to_gmem(output_smem.at[0], output_slice(tile))
        pl.when(i + NUM_STAGES < work.num_tiles)(partial(fetch, i + NUM_STAGES))
        return carry

    carry = lax.fori_loop(0, work.num_tiles, body, carry)
    if output_slice is not None:
        plgpu.wait_smem_to_gmem(0)
    return carry
