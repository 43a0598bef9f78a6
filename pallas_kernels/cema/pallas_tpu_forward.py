"""CEMA's forward kernel for TPU.

A grid step takes 128 channels through a tile of blocks of T = 128 tokens: transpose; what every
block adds to the state; the recurrence over blocks, for all channels at once; lags and entering
states to outputs; transpose back. The state waits in scratch for the row's next tile.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.cema import pallas_tpu_layout as layout
from pallas_kernels.cema.pallas_tpu_call import Frame
from pallas_kernels.cema.pallas_tpu_layout import (
    BLOCK_STRIDE,
    CHANNELS,
    LANES,
    Documents,
    Plan,
    multiply,
)
from pallas_kernels.cema.pallas_tpu_tables import TpuTables


class ForwardResult(NamedTuple):
    """What the forward kernel returns.

    Attributes:
      y: the output.
      picked: the state entering each row's block `picked_block`.
      states: the states entering every block, if asked for.
    """

    y: Float[Array, "B L D"]
    picked: Float[Array, "B G 128"]
    states: Float[Array, "B J G 128"] | None


class _Refs(NamedTuple):
    picked_block: Any
    x: Any
    taps: Any
    to_state: Any
    from_state: Any
    decay: Any
    initial: Any
    y: Any
    picked: Any
    x_blocks: Any
    y_blocks: Any
    entering: Any
    state: Any
    states: Any = None
    cuts: Any = None
    most_cuts: Any = None
    piece: Any = None
    piece_from_end: Any = None


def cema_forward(
    x: Float[Array, "B L D"],
    tables: TpuTables,
    initial: Float[Array, "B G 128"],
    documents: Documents | None,
    picked_block: Int32[Array, " B"],
    plan: Plan,
    *,
    save_states: bool,
) -> ForwardResult:
    """y[t] = Σ_τ K[τ] x[t-τ] + Re Σ_n G[t] H[j], H[j+1] = A H[j] + Σ_t W[t] x[t] (README.md).

    Args:
      x: bfloat16, or float32 if the plan is exact; D a multiple of 128, L at least one tile.
      tables: from `build_tables`.
      initial: the state before every row.
      documents: where documents begin and end, or None.
      picked_block: the block of every row whose entering state is wanted.
      plan: what the kernel is specialised for.
      save_states: whether to return the states that the backward kernel needs.
    """
    frame = Frame(plan, x.shape, picked_block, documents, backward=False)
    frame.inputs |= {"x": frame.sequence(x), "initial": frame.row_state(initial)}
    frame.add_tables(tables, tables.taps)
    frame.add_outputs(
        y=frame.sequence(jax.ShapeDtypeStruct(x.shape, x.dtype)),
        picked=frame.row_state(jax.ShapeDtypeStruct(initial.shape, jnp.float32)),
    )
    if save_states:
        shape = (x.shape[0], plan.tiles * plan.blocks, *initial.shape[1:])
        frame.add_outputs(states=frame.block_states(jax.ShapeDtypeStruct(shape, jnp.float32)))
    blocks = pltpu.VMEM((plan.blocks * BLOCK_STRIDE, CHANNELS), jnp.float32)
    scratch = {
        "x_blocks": blocks,
        "y_blocks": blocks,
        "entering": pltpu.VMEM((plan.blocks * plan.state_stride, LANES), jnp.float32),
        "state": pltpu.VMEM((plan.groups, LANES), jnp.float32),
    }
    results = frame.call(
        lambda refs: _kernel(refs, plan), _Refs, scratch, name="cema_forward", products=3
    )
    return ForwardResult(results["y"], results["picked"], results.get("states"))


def _kernel(refs: _Refs, plan: Plan) -> None:
    row, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        refs.state[...] = refs.initial[0]

    layout.load_transposed(refs.x, refs.x_blocks, refs.piece, step, plan)
    if refs.most_cuts is None:
        _compute_tile(refs, plan, None)
    else:
        most_cuts = refs.most_cuts[row, step]

        @pl.when(most_cuts == 0)
        def _without_borders() -> None:
            _compute_tile(refs, plan, None)

        @pl.when(most_cuts > 0)
        def _with_borders() -> None:
            _compute_tile(refs, plan, most_cuts)

    layout.store_transposed(refs.y_blocks, refs.y, refs.piece, plan)


def _compute_tile(refs: _Refs, plan: Plan, most_cuts: Array | None) -> None:
    lax.fori_loop(
        0,
        plan.groups,
        lambda group, _: _sum_up_blocks(refs, plan, most_cuts, group),
        None,
        unroll=plan.unroll,
    )
    _scan_blocks(refs, plan, most_cuts)
    lax.fori_loop(
        0,
        plan.groups,
        lambda group, _: _write_outputs(refs, plan, most_cuts, group),
        None,
        unroll=plan.unroll,
    )


def _sum_up_blocks(refs: _Refs, plan: Plan, most_cuts: Array | None, group: Array) -> None:
    rows = [
        layout.channel_rows(refs.x_blocks, group * plan.group + i, plan) for i in range(plan.group)
    ]
    if most_cuts is not None:
        rows = [jnp.where(refs.piece_from_end[0] == 0, row, 0.0) for row in rows]
    x = layout.as_terms(jnp.concatenate(rows, axis=0), plan.exact)
    sums = multiply(x, layout.table_of_group(refs.to_state, group), (1, 1), plan)
    own = layout.own_channel(jnp.split(sums, plan.group, axis=0), plan)
    refs.entering[pl.ds(group, plan.blocks, stride=plan.state_stride), :] = own


def _scan_blocks(refs: _Refs, plan: Plan, most_cuts: Array | None) -> None:
    row, step = pl.program_id(1), pl.program_id(2)
    same, swapped = refs.decay[:, 0, :], refs.decay[:, 1, :]

    def advance(j: Array, state: Array) -> Array:
        where = pl.ds(j * plan.state_stride, plan.groups)
        added = refs.entering[where, :]
        # A state takes the place of what its block adds.
        refs.entering[where, :] = state
        if refs.states is not None:
            refs.states[0, j] = state
        carried = state * same + layout.rotate_half(state) * swapped
        if most_cuts is not None:
            is_whole = refs.cuts[row, step * plan.blocks + j] == 0
            carried = jnp.where(is_whole, carried, 0.0)
        return carried + added

    refs.state[...] = lax.fori_loop(0, plan.blocks, advance, refs.state[...])
    picked = refs.picked_block[row]

    @pl.when(picked // plan.blocks == step)
    def _keep_picked() -> None:
        where = pl.ds(picked % plan.blocks * plan.state_stride, plan.groups)
        refs.picked[0] = refs.entering[where, :]


def _write_outputs(refs: _Refs, plan: Plan, most_cuts: Array | None, group: Array) -> None:
    mask = layout.toeplitz_mask(plan, keep_upper=True)
    entering = refs.entering[pl.ds(group, plan.blocks, stride=plan.state_stride), :]
    states = layout.split(layout.one_channel_a_row(entering, plan), plan.exact)
    carried = multiply(states, layout.table_of_group(refs.from_state, group), (1, 0), plan)
    for i, y in enumerate(jnp.split(carried, plan.group, axis=0)):
        channel = group * plan.group + i
        x = layout.channel_rows(refs.x_blocks, channel, plan)
        matrix = layout.toeplitz(refs.taps[channel], mask, plan)
        lags = multiply(layout.as_terms(x, plan.exact), matrix, (1, 0), plan)
        if most_cuts is not None:
            y = jnp.where(refs.piece[0] == 0, y, 0.0)
            lags = _lags_of_later_pieces(refs, plan, most_cuts, x, matrix, lags)
        where = pl.ds(channel, plan.blocks, stride=BLOCK_STRIDE)
        refs.y_blocks[where, :] = y + lags


def _lags_of_later_pieces(
    refs: _Refs, plan: Plan, most_cuts: Array, x: Array, matrix: tuple[Array, ...], lags: Array
) -> Array:
    def replace(number: Array, lags: Array) -> Array:
        is_own = refs.piece[0] == number
        own = layout.as_terms(jnp.where(is_own, x, 0.0), plan.exact)
        return jnp.where(is_own, multiply(own, matrix, (1, 0), plan), lags)

    # Lags reach back only, so the first piece needs no mask.
    return lax.fori_loop(1, most_cuts + 1, replace, lags)
