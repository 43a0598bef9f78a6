"""The pipeline of tiles through shared memory, forward or backward in time.

Asynchronous copies prefetch the tiles that a warpgroup reads, and write back its results.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cema.mosaic_gpu.layout import CemaWorkItem
from pallas_kernels.cema.row_splits.types import CHANNELS, TILE

# Tiles of every streamed array in shared memory.
STAGES = 2


class CemaBuffers(NamedTuple):
    """Shared memory and barriers of a warpgroup.

    Attributes:
      tiles_smem: for every streamed array, STAGES tiles.
      barriers: one per stage; completes when all tiles of the stage have arrived.
    """

    tiles_smem: tuple
    barriers: Any


def make_buffers(*, inputs: Sequence[Any], outputs: Sequence[Any] = ()) -> CemaBuffers:
    """Scratch for streamed arrays of these dtypes."""
    return CemaBuffers(
        tuple(plgpu.SMEM((STAGES, TILE, CHANNELS), dtype) for dtype in (*inputs, *outputs)),
        plgpu.Barrier(num_arrivals=len(inputs), num_barriers=STAGES),
    )


def stream_tiles(
    work: CemaWorkItem,
    buffers: CemaBuffers,
    sources_gmem: list[Any],
    targets_gmem: list[Any],
    carry: Any,
    run_tile: Callable[..., Any],
    *,
    backward: bool,
) -> Any:
    """Carries `carry` through `run_tile(tile, read, written, carry)` over the tiles of a split.

    Args:
      work: the split; its tiles run from the last to the first if `backward`.
      buffers: shared memory of the sources, then of the targets.
      sources_gmem: arrays (B, L, D) to read.
      targets_gmem: arrays (B, L, D) to write.
      carry: the state before the first tile that runs.
      run_tile: takes the tile's index in the row, and the tiles in shared memory that it reads and
        writes.
      backward: runs backward in time.
    """
    last_tile = work.first_tile + work.num_tiles - 1

    def window(array, tile):
        return array.at[work.row, pl.ds(tile * TILE, TILE), work.channels]

    def barrier(stage):
        return buffers.barriers.at[stage]

    def prefetch(i):
        stage = lax.rem(i, STAGES)
        tile = last_tile - i if backward else work.first_tile + i
        for source, tiles_smem in zip(sources_gmem, buffers.tiles_smem):
            plgpu.copy_gmem_to_smem(window(source, tile), tiles_smem.at[stage], barrier(stage))

    for i in range(STAGES):
        pl.when(i < work.num_tiles)(partial(prefetch, jnp.int32(i)))

    def body(i, carry):
        stage = lax.rem(i, STAGES)
        tile = last_tile - i if backward else work.first_tile + i
        plgpu.barrier_wait(barrier(stage))
        if targets_gmem:
            # The stage's previous results must have left shared memory.
            plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)
        tiles = [tiles_smem.at[stage] for tiles_smem in buffers.tiles_smem]
        written = tiles[len(sources_gmem) :]
        carry = run_tile(tile, tiles[: len(sources_gmem)], written, carry)
        plgpu.commit_smem()
        for target, tile_smem in zip(targets_gmem, written, strict=True):
            plgpu.copy_smem_to_gmem(tile_smem, window(target, tile))
        pl.when(i + STAGES < work.num_tiles)(partial(prefetch, i + STAGES))
        return carry

    return lax.fori_loop(0, work.num_tiles, body, carry)
