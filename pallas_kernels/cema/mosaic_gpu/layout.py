"""Work items and data layout of CEMA's Hopper kernels.

The grid is (blocks of 128 channels, splits of a row, rows). A warpgroup owns one block of channels
of one split; thread i holds channel i of every value in registers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Complex, Float

CHANNELS = 128
# Tokens of a tile; an int32 has one bit for each of them.
TILE = 32
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


class CemaGeometry(NamedTuple):
    """Static sizes of a call.

    Attributes:
      rows: B.
      tiles: L / TILE.
      channel_blocks: D / CHANNELS.
      order: N.
      tiles_per_split: of every split but the last, which may be shorter.
    """

    rows: int
    tiles: int
    channel_blocks: int
    order: int
    tiles_per_split: int

    @property
    def splits(self) -> int:
        """Splits of a row."""
        return -(-self.tiles // self.tiles_per_split)

    def work_item(self, split: Any) -> CemaWorkItem:
        """The work item of a split, for the row and channels of this grid index ("d", "s", "b")."""
        first_tile = split * self.tiles_per_split
        num_tiles = jnp.minimum(self.tiles_per_split, self.tiles - first_tile)
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


def to_rows(z: Complex[Array, "*S D N"]) -> Float[Array, "*S 2 N D"]:
    """Complex states in the kernels' memory layout: channels are contiguous."""
    return jnp.swapaxes(jnp.stack([z.real, z.imag], axis=-3), -1, -2)


def from_rows(a: Float[Array, "*S 2 N D"]) -> Complex[Array, "*S D N"]:
    """The inverse of `to_rows`."""
    a = jnp.swapaxes(a, -1, -2)
    return jax.lax.complex(a[..., 0, :, :], a[..., 1, :, :])
