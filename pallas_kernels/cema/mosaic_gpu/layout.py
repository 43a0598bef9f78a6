"""Work items and data layout of CEMA's Hopper kernels.

The grid is (blocks of 128 channels, splits of a row, rows). A warpgroup owns one block of channels
of one split; thread i holds channel i of every value in registers.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cema.row_splits.types import CHANNELS, CemaGeometry

_LANES = plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1)

Lanes = Any  # float32 (CHANNELS,) in registers, one number per thread


class CemaWorkItem(NamedTuple):
    """The share of one warpgroup; all fields are traced int32 but `channels`.

    Attributes:
      row: row of the batch.
      channel_block: block of channels.
      split: split of the row.
      channels: slice of the block's channels.
      first_tile: first tile of the split.
      num_tiles: tiles of the split.
    """

    row: Any
    channel_block: Any
    split: Any
    channels: Any
    first_tile: Any
    num_tiles: Any


def work_item(geometry: CemaGeometry, split: Any) -> CemaWorkItem:
    """The work item of a split, for the row and channels of this grid index ("d", "s", "b")."""
    first_tile = split * geometry.tiles_per_split
    num_tiles = jnp.minimum(geometry.tiles_per_split, geometry.tiles - first_tile)
    block = lax.axis_index("d")
    channels = pl.ds(block * CHANNELS, CHANNELS)
    return CemaWorkItem(lax.axis_index("b"), block, split, channels, first_tile, num_tiles)


def load(ref: Any, *index: Any) -> Lanes:
    """128 channels of a reference."""
    return plgpu.load(ref.at[index], layout=_LANES)


def load_rows(ref: Any, count: int, channels: Any) -> tuple[Lanes, ...]:
    """The first `count` rows of a (rows, channels) reference."""
    return tuple(load(ref, i, channels) for i in range(count))


def store_rows(ref: Any, channels: Any, values: Any) -> None:
    """The inverse of `load_rows`."""
    for i, value in enumerate(values):
        ref[i, channels] = value


def load_complex(ref: Any, order: int, channels: Any) -> tuple:
    """Real and imaginary parts of every order, from a (2, N, D) reference."""
    return tuple(load_rows(ref.at[part], order, channels) for part in (0, 1))


def store_complex(ref: Any, channels: Any, values: tuple) -> None:
    """The inverse of `load_complex`."""
    for part, rows in enumerate(values):
        store_rows(ref.at[part], channels, rows)


def fill(value: float) -> Lanes:
    """The same number in all channels."""
    return plgpu.layout_cast(jnp.full((CHANNELS,), value, jnp.float32), _LANES)


def select(flag: Any, if_true: Lanes, if_false: Lanes) -> Lanes:
    """One of two values by a scalar; a NaN in the other one has no effect."""
    lanes = jnp.broadcast_to(jnp.where(flag, 1.0, 0.0), (CHANNELS,))
    return jnp.where(plgpu.layout_cast(lanes, _LANES) > 0.5, if_true, if_false)
