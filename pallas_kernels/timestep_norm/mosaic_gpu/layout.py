"""Registers of the Hopper kernels: tiles of 128 tokens, in three layouts.

A number for every token and feature is held in the layout of wgmma, where four threads share a row.
A number for every token is held one token a thread (`LANE_LAYOUT`) for work along tokens, or like
the rows of wgmma (`ROW_LAYOUT`) for work along features; shared memory moves it from one to the
other.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.timestep_norm.row_splits.types import TILE

# Tokens of which a warpgroup holds all features in registers at once.
HALF_TILE = 64
HALVES = TILE // HALF_TILE
LANE_LAYOUT = plgpu.Layout.WG_STRIDED((TILE,), vec_size=1)
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(0)

Array = Any  # float32 in registers


def load_half(tile_smem: Any, half: int) -> Array:
    """64 tokens of a tile as float32."""
    rows = tile_smem.at[0, pl.ds(half * HALF_TILE, HALF_TILE)]
    return plgpu.load(rows, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def load_rows(ref: Any, half: int) -> Array:
    """A number for each of 64 tokens of a (128,) reference."""
    rows = ref.at[pl.ds(half * HALF_TILE, HALF_TILE)]
    return plgpu.load(rows, layout=ROW_LAYOUT, optimized=False)


def load_lanes(ref: Any) -> Array:
    """A number for each of 128 tokens."""
    return plgpu.load(ref, layout=LANE_LAYOUT)


def load_columns(ref: Any, columns: Any) -> Array:
    """A number for each feature."""
    return plgpu.load(ref.at[columns], layout=COLUMN_LAYOUT, optimized=False)


def broadcast_groups(groups: list[Array], width: int) -> Array:
    """A number for every token and group, repeated for the group's features."""
    repeated = [lax.broadcast_in_dim(rows, (HALF_TILE, width), [0]) for rows in groups]
    return repeated[0] if len(repeated) == 1 else lax.concatenate(repeated, 1)


def broadcast_columns(columns: Array) -> Array:
    """A number for every feature, repeated for 64 tokens."""
    return lax.broadcast_in_dim(columns, (HALF_TILE, *columns.shape), [1])


def broadcast_scalar(
    scalar: Any, shape: tuple[int, ...] = (TILE,), layout: Any = LANE_LAYOUT
) -> Array:
    """The same number for all tokens."""
    return plgpu.layout_cast(jnp.broadcast_to(jnp.float32(scalar), shape), layout)


def sum_groups(values: Array, width: int) -> list[Array]:
    """Sums over the features of each group."""
    starts = range(0, values.shape[1], width)
    return [
        lax.slice(values, (0, start), (HALF_TILE, start + width)).sum(axis=1) for start in starts
    ]


def zeros(shape: tuple[int, ...], layout: Any) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def lane_index() -> Array:
    """Index of the token in its tile."""
    return plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=LANE_LAYOUT)


def synchronize() -> None:
    """Barrier of a warpgroup: every thread sees what the others have stored to shared memory."""
    plgpu.commit_smem()
