"""CEMA's gradient kernel for Hopper: the recurrence of `forward.py`, backward in time.

Driven by dy, the same system gives the adjoint state e; dx is e's output as y is h's. For
k = ∂e/∂q, two real numbers m and v (the halves) again cost three multiplications:

    m[t] = a m[t+1] - s² v[t+1] + e_u[t+1]    v[t] = a v[t+1] + m[t+1]
    Re k = 2 m - e_w                          Im k = 2 s v

    ∂/∂c = Σ x e (+ q h e at the row's first token)        ∂/∂q = c (Σ x k (+ h (e + q k)))

Every split starts from k = 0: the k of later tokens meets x only through the state h before the
later split, which adds q h k to its sum.
"""

from functools import partial
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cema.mosaic_gpu import recurrence
from pallas_kernels.cema.mosaic_gpu.layout import load_complex, select, store_complex, work_item
from pallas_kernels.cema.mosaic_gpu.pipeline import CemaBuffers, stream_tiles
from pallas_kernels.cema.mosaic_gpu.state_passing import fold_summaries
from pallas_kernels.cema.mosaic_gpu.tile_iterator import make_run_tile
from pallas_kernels.cema.row_splits.tables import CemaOperands
from pallas_kernels.cema.row_splits.types import CemaGeometry, CemaGradientSums


def gradient_kernel(
    operands: tuple[Any, Any, CemaOperands],
    results: CemaGradientSums,
    buffers: CemaBuffers,
    *,
    geometry: CemaGeometry,
) -> None:
    """dx of a split, and its sums for the gradients of the parameters."""
    x, dy, inputs = operands
    split = lax.axis_index("s")
    order, tables = geometry.order, inputs.tables
    work = work_item(geometry, split)
    row, channels = work.row, work.channels
    zeros = recurrence.zeros(order), recurrence.zeros(order)
    e = fold_summaries(zeros, inputs, work, geometry, backward=True)
    if inputs.initial is not None:
        e_after_row = load_complex(inputs.initial.at[row], order, channels)
        is_last = split == geometry.splits - 1
        e = jax.tree.map(partial(select, is_last), e_after_row, e)
    one_step = recurrence.load_one_step(tables, order, channels)
    weights = recurrence.load_weights(tables, order, channels)
    e = recurrence.to_pair(e, tables, channels)
    # k = 0 means Re k = 2 m - e_w = 0.
    k = tuple(0.5 * w for w in e[1]), zeros[1]

    def reset(tile, position, carry):
        return carry._replace(e=zeros, k=zeros)

    def store_first(carry):
        k = recurrence.derivative(carry.e, carry.k, tables, channels)
        store_complex(
            results.first_e.at[row], channels, recurrence.to_complex(carry.e, tables, channels)
        )
        store_complex(results.first_k.at[row], channels, k)

    run_tile = make_run_tile(
        inputs.documents,
        work,
        partial(recurrence.gradient_step, one_step=one_step, weights=weights),
        reset,
        capture=store_first,
        capture_at=0,
        backward=True,
    )
    carry = recurrence.GradientCarry(e, k, zeros, zeros, zeros[0][0])
    carry = stream_tiles(work, buffers, [x, dy], [results.dx], carry, run_tile, backward=True)
    if inputs.documents is None:
        pl.when(split == 0)(partial(store_first, carry))
    h = load_complex(inputs.previous_states.at[row, split], order, channels)
    x_k = recurrence.derivative(carry.x_e, carry.x_k, tables, channels)
    k = recurrence.derivative(carry.e, carry.k, tables, channels)
    x_k = recurrence.add_previous_state(x_k, h, k, tables, channels)
    x_e = recurrence.to_complex(carry.x_e, tables, channels)
    store_complex(results.x_e.at[row, split], channels, x_e)
    store_complex(results.x_k.at[row, split], channels, x_k)
    results.x_dy[row, split, channels] = carry.x_dy
    plgpu.wait_smem_to_gmem(0)
