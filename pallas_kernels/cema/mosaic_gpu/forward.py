"""CEMA's forward kernels for Hopper: the recurrence in registers, rows split in time.

One thread holds the state of one channel, divided by p: h = u + i s w with q = a + i s per order,

    u[t] = a u[t-1] - s² w[t-1] + x[t]        w[t] = a w[t-1] + u[t-1]
    y[t] = Σ_n (Re c u[t] - s Im c w[t]) + omega x[t]                       c = p gamma / √N

This is the complex recurrence with one multiplication less, since w = Im h / s.

The splits of a row run in parallel. `summary_kernel` finds the state that every split adds; the
output kernel folds the summaries of the splits before its own with q^split, then writes y.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cema.mosaic_gpu import recurrence
from pallas_kernels.cema.mosaic_gpu.layout import load_complex, store_complex, work_item
from pallas_kernels.cema.mosaic_gpu.pipeline import CemaBuffers, stream_tiles
from pallas_kernels.cema.mosaic_gpu.state_passing import find_horizon, fold_summaries, make_reset
from pallas_kernels.cema.mosaic_gpu.tile_iterator import make_run_tile
from pallas_kernels.cema.row_splits.tables import CemaOperands
from pallas_kernels.cema.row_splits.types import CemaForwardResults, CemaGeometry


def summary_kernel(
    operands: tuple[Any, CemaOperands],
    summaries: Any,
    buffers: CemaBuffers,
    *,
    geometry: CemaGeometry,
    first_split: int,
    backward: bool,
) -> None:
    """The state that a split's own tokens add: after it, or before it if backward (x is dy)."""
    x, inputs = operands
    index = lax.axis_index("s")
    order = geometry.order
    zeros = recurrence.zeros(order), recurrence.zeros(order)
    work = work_item(geometry, index + first_split)
    # Tokens beyond the horizon leave nothing of themselves at the split's end.
    num_tiles = jnp.minimum(work.num_tiles, find_horizon(inputs.tables, work))
    first_tile = work.first_tile if backward else work.first_tile + work.num_tiles - num_tiles
    near = work._replace(first_tile=first_tile, num_tiles=num_tiles)
    load_one_step = partial(recurrence.load_one_step, inputs.tables, order, work.channels)
    step = recurrence.forward_step(recurrence.square(load_one_step()), None, load_one_step)
    reset = make_reset(inputs, work, order)
    run_tile = make_run_tile(
        inputs.documents, near, step, reset, tokens_per_step=2, backward=backward
    )
    pair = stream_tiles(near, buffers, [x], [], zeros, run_tile, backward=backward)
    h = recurrence.to_complex(pair, inputs.tables, work.channels)
    store_complex(summaries.at[work.row, index], work.channels, h)


def output_kernel(
    operands: tuple[Any, CemaOperands],
    results: CemaForwardResults,
    buffers: CemaBuffers,
    *,
    geometry: CemaGeometry,
) -> None:
    """y of a split, and the final state."""
    x, inputs = operands
    split = lax.axis_index("s")
    order = geometry.order
    work = work_item(geometry, split)
    channels, tables = work.channels, inputs.tables
    h = recurrence.zeros(order), recurrence.zeros(order)
    if inputs.initial is not None:
        h = load_complex(inputs.initial.at[work.row], order, channels)
    h = fold_summaries(h, inputs, work, geometry, backward=False)
    if results.previous_states is not None:
        store_complex(results.previous_states.at[work.row, split], channels, h)
    load_one_step = partial(recurrence.load_one_step, tables, order, channels)
    one_step = load_one_step()
    weights = recurrence.load_output_weights(tables, one_step, order, channels)
    step = recurrence.forward_step(recurrence.square(one_step), weights, load_one_step)

    def store_final_state(pair):
        store_complex(
            results.final_state.at[work.row],
            channels,
            recurrence.to_complex(pair, tables, channels),
        )

    run_tile = make_run_tile(
        inputs.documents,
        work,
        step,
        make_reset(inputs, work, order),
        tokens_per_step=2,
        capture=store_final_state,
        capture_at=1,
        backward=False,
    )
    start = recurrence.to_pair(h, tables, channels)
    pair = stream_tiles(work, buffers, [x], [results.y], start, run_tile, backward=False)
    if inputs.documents is None:
        pl.when(split == geometry.splits - 1)(partial(store_final_state, pair))
    plgpu.wait_smem_to_gmem(0)
