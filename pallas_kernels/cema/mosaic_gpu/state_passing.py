"""The state before a split, from the summaries of the splits before it (kernel code)."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.cema.mosaic_gpu import recurrence
from pallas_kernels.cema.mosaic_gpu.layout import (
    CemaWorkItem,
    load_complex,
    select,
)
from pallas_kernels.cema.row_splits.tables import CemaOperands
from pallas_kernels.cema.row_splits.types import TILE, CemaGeometry


def find_horizon(tables: Any, work: CemaWorkItem) -> Any:
    """Tiles after which less than 2^-64 of any state is left: |q|^t <= exp(-(1 - |q|) t)."""
    damping = jnp.maximum(tables.damping[work.channel_block], 2.0**-24)
    tiles = 64 * math.log(2) / TILE / damping
    return tiles.astype(jnp.int32) + 1


def fold_summaries(
    h: tuple, operands: CemaOperands, work: CemaWorkItem, geometry: CemaGeometry, *, backward: bool
) -> tuple:
    """The complex state before a split, from `h` before the row; backward from e after it."""
    if operands.summaries is None:
        return h
    order, tables = geometry.order, operands.tables
    decay = load_complex(tables.coefficients.at[pl.ds(4, 2)], order, work.channels)
    count = geometry.splits - 1 - work.split if backward else work.split
    # Splits beyond the horizon are skipped, and then also h.
    num_near = lax.div(find_horizon(tables, work), geometry.tiles_per_split) + 1
    skipped = jnp.maximum(count - num_near, 0)

    def zero_unless(flag, h):
        return tuple(tuple(select(flag, v, jnp.zeros_like(v)) for v in part) for part in h)

    def body(i, h):
        index = geometry.splits - 2 - i if backward else i
        split = index + 1 if backward else index
        summary = load_complex(operands.summaries.at[work.row, index], order, work.channels)
        if operands.documents is not None:
            passes = operands.documents.passes_state_through[work.row, split] == 1
            h = zero_unless(passes, h)
        real, imag = [], []
        for n in range(order):
            real.append(summary[0][n] + decay[0][n] * h[0][n] - decay[1][n] * h[1][n])
            imag.append(summary[1][n] + decay[0][n] * h[1][n] + decay[1][n] * h[0][n])
        return tuple(real), tuple(imag)

    return lax.fori_loop(skipped, count, body, zero_unless(skipped == 0, h))


def make_reset(operands: CemaOperands, work: CemaWorkItem, order: int) -> Callable[..., Any]:
    """The `reset` of `make_run_tile`: the initial state for the row's first document, else zero."""
    zeros = recurrence.zeros(order), recurrence.zeros(order)

    def reset(tile, position, carry):
        if operands.initial is None:
            return zeros
        is_first = operands.documents.row_ends[work.row, 0] == tile * TILE + position

        def initial_state():
            h = load_complex(operands.initial.at[work.row], order, work.channels)
            return recurrence.to_pair(h, operands.tables, work.channels)

        return lax.cond(is_first, initial_state, lambda: zeros)

    return reset
