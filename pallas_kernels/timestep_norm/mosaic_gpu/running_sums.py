"""Running sums over the tokens of a tile, through shared memory."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.timestep_norm.mosaic_gpu.layout import (
    LANE_LAYOUT,
    Array,
    load_lanes,
    synchronize,
    zeros,
)
from pallas_kernels.timestep_norm.row_splits.types import TILE

# Distances of the tokens whose sums a thread adds, in each of four steps.
_SHIFTS = ((1, 2, 3), (4, 8, 12), (16, 32, 48), (64,))
# Zeros on either side of a tile: the largest distance.
_MARGIN = 64


def running_sums_smem(count: int) -> Any:
    """Shared memory for `running_sums` of at most `count` arrays: two buffers in turns."""
    return plgpu.SMEM((2, count, TILE + 2 * _MARGIN), jnp.float32)


def clear_margins(sums_smem: Any) -> None:
    """Zeros the memory; `running_sums` never writes to its margins."""
    for buffer in range(sums_smem.shape[0]):
        for i in range(sums_smem.shape[1]):
            for start in range(0, sums_smem.shape[2], TILE):
                sums_smem[buffer, i, pl.ds(start, TILE)] = zeros((TILE,), LANE_LAYOUT)
    synchronize()


def running_sums(
    sums_smem: Any, values: list[Array], reach: Array | None, *, reverse: bool
) -> list[Array]:
    """Inclusive sums over a tile's tokens, of several arrays at once.

    Args:
      sums_smem: from `running_sums_smem`, after `clear_margins`.
      values: a number for every token.
      reach: tokens between this one and its document's first one (last one if `reverse`); None if
        the whole tile is one document. Other documents' numbers are selected away, never
        multiplied by 0, so that NaN does not spread.
      reverse: sums from the tile's end.
    """
    for step, shifts in enumerate(_SHIFTS):
        # The two buffers alternate, so that one barrier a step is enough.
        buffer = sums_smem.at[step % 2]
        for i, value in enumerate(values):
            buffer[i, pl.ds(_MARGIN, TILE)] = value
        synchronize()
        sums = []
        for i, value in enumerate(values):
            for shift in shifts:
                start = _MARGIN + shift if reverse else _MARGIN - shift
                other = load_lanes(buffer.at[i, pl.ds(start, TILE)])
                if reach is not None:
                    other = jnp.where(reach >= shift, other, jnp.zeros_like(other))
                value = value + other
            sums.append(value)
        values = sums
    return values
