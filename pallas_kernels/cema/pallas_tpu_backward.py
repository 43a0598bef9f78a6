"""CEMA's backward kernel for TPU: `pallas_tpu_forward` transposed, from a row's end to its start."""

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
    BLOCK,
    BLOCK_STRIDE,
    CHANNELS,
    HALF,
    LANES,
    Documents,
    Plan,
    multiply,
)
from pallas_kernels.cema.pallas_tpu_tables import TpuTables


class BackwardResult(NamedTuple):
    """Gradients of what `cema_forward` took."""

    x: Float[Array, "B L D"]
    tables: TpuTables
    initial: Float[Array, "B G 128"]


class _Refs(NamedTuple):
    picked_block: Any
    x: Any
    dy: Any
    states: Any
    taps: Any
    to_state: Any
    from_state: Any
    decay: Any
    d_picked: Any
    dx: Any
    d_initial: Any
    d_taps: Any
    d_to_state: Any
    d_from_state: Any
    d_decay: Any
    x_blocks: Any
    dy_blocks: Any
    dx_blocks: Any
    leaving: Any
    d_state: Any
    cuts: Any = None
    most_cuts: Any = None
    piece: Any = None
    piece_from_end: Any = None


def cema_backward(
    x: Float[Array, "B L D"],
    dy: Float[Array, "B L D"],
    d_picked: Float[Array, "B G 128"],
    states: Float[Array, "B J G 128"],
    tables: TpuTables,
    documents: Documents | None,
    picked_block: Int32[Array, " B"],
    plan: Plan,
) -> BackwardResult:
    """dH[j] = conj(A) dH[j+1] + Σ_t conj(G[t]) dy[t], and from it all gradients (README.md).

    Args:
      x: as in the forward kernel.
      dy: gradient of y, in its dtype.
      d_picked: gradient of `picked`.
      states: from the forward kernel, at least as many blocks as the plan has.
      tables: as in the forward kernel.
      documents: as in the forward kernel.
      picked_block: as in the forward kernel.
      plan: what the kernel is specialised for.
    """
    frame = Frame(plan, x.shape, picked_block, documents, backward=True)
    frame.inputs |= {
        "x": frame.sequence(x),
        "dy": frame.sequence(dy),
        "states": frame.block_states(states),
        "d_picked": frame.row_state(d_picked),
    }
    reversed_taps = jnp.roll(tables.taps[:, ::-1], 1, axis=1)
    frame.add_tables(tables, reversed_taps)
    frame.add_outputs(
        dx=frame.sequence(jax.ShapeDtypeStruct(x.shape, x.dtype)),
        d_initial=frame.row_state(jax.ShapeDtypeStruct(d_picked.shape, jnp.float32)),
    )
    frame.add_table_gradients(
        d_taps=(tables.taps.shape[0], layout.SUBLANES, BLOCK),
        d_to_state=tables.to_state.shape,
        d_from_state=tables.from_state.shape,
        d_decay=(tables.decay.shape[0], 2, LANES),
    )
    blocks = pltpu.VMEM((plan.blocks * BLOCK_STRIDE, CHANNELS), jnp.float32)
    scratch = {
        "x_blocks": blocks,
        "dy_blocks": blocks,
        "dx_blocks": blocks,
        "leaving": pltpu.VMEM((plan.blocks * plan.state_stride, LANES), jnp.float32),
        "d_state": pltpu.VMEM((plan.groups, LANES), jnp.float32),
    }
    results = frame.call(
        lambda refs: _kernel(refs, plan), _Refs, scratch, name="cema_backward", products=6
    )
    d_tables = TpuTables(
        taps=layout.unfold_taps(results["d_taps"]),
        to_state=results["d_to_state"],
        from_state=results["d_from_state"],
        decay=_decay_gradient(results["d_decay"]),
    )
    return BackwardResult(results["dx"], d_tables, results["d_initial"])


def _decay_gradient(products: Float[Array, "G 2 128"]) -> Float[Array, "G 128"]:
    same, swapped = products[:, 0], products[:, 1]
    re = same[:, :HALF] + same[:, HALF:]
    im = swapped[:, :HALF] - swapped[:, HALF:]
    return jnp.concatenate([re, im], axis=-1)


def _kernel(refs: _Refs, plan: Plan) -> None:
    row, step = pl.program_id(1), pl.program_id(2)
    tile = plan.tiles - 1 - step

    @pl.when(step == 0)
    def _start_row() -> None:
        refs.d_state[...] = jnp.zeros_like(refs.d_state)

    @pl.when((step == 0) & (row == 0))
    def _start_channels() -> None:
        for ref in (refs.d_taps, refs.d_to_state, refs.d_from_state, refs.d_decay):
            ref[...] = jnp.zeros_like(ref)

    layout.load_transposed(refs.x, refs.x_blocks, refs.piece, tile, plan)
    layout.load_transposed(refs.dy, refs.dy_blocks, refs.piece, tile, plan)
    if refs.most_cuts is None:
        _compute_tile(refs, plan, None)
    else:
        most_cuts = refs.most_cuts[row, tile]

        @pl.when(most_cuts == 0)
        def _without_borders() -> None:
            _compute_tile(refs, plan, None)

        @pl.when(most_cuts > 0)
        def _with_borders() -> None:
            _compute_tile(refs, plan, most_cuts)

    layout.store_transposed(refs.dx_blocks, refs.dx, refs.piece, plan)

    @pl.when(step == plan.tiles - 1)
    def _finish_row() -> None:
        refs.d_initial[0] = refs.d_state[...]


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
        lambda group, _: _write_gradients(refs, plan, most_cuts, group),
        None,
        unroll=plan.unroll,
    )


def _rows_of_group(ref: Any, plan: Plan, group: Array) -> list[Array]:
    return [layout.channel_rows(ref, group * plan.group + i, plan) for i in range(plan.group)]


def _stack(rows: list[Array], plan: Plan, kept: Array | None) -> tuple[Array, ...]:
    if kept is not None:
        rows = [jnp.where(kept, row, 0.0) for row in rows]
    return layout.as_terms(jnp.concatenate(rows, axis=0), plan.exact)


def _in_first(refs: _Refs, most_cuts: Array | None) -> Array | None:
    return None if most_cuts is None else refs.piece[0] == 0


def _in_last(refs: _Refs, most_cuts: Array | None) -> Array | None:
    return None if most_cuts is None else refs.piece_from_end[0] == 0


def _sum_up_blocks(refs: _Refs, plan: Plan, most_cuts: Array | None, group: Array) -> None:
    dy = _stack(_rows_of_group(refs.dy_blocks, plan, group), plan, _in_first(refs, most_cuts))
    sums = multiply(dy, layout.table_of_group(refs.from_state, group), (1, 1), plan)
    own = layout.own_channel(jnp.split(sums, plan.group, axis=0), plan)
    refs.leaving[pl.ds(group, plan.blocks, stride=plan.state_stride), :] = own


def _scan_blocks(refs: _Refs, plan: Plan, most_cuts: Array | None) -> None:
    row, step = pl.program_id(1), pl.program_id(2)
    first_block = (plan.tiles - 1 - step) * plan.blocks
    same, swapped = refs.decay[:, 0, :], refs.decay[:, 1, :]
    d_picked = refs.d_picked[0]

    def go_back(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_leaving, d_same, d_swapped = carry
        j = plan.blocks - 1 - i
        where = pl.ds(j * plan.state_stride, plan.groups)
        added = refs.leaving[where, :]
        # The gradient of the state after a block takes the place of what the block adds to it.
        refs.leaving[where, :] = d_leaving
        d_carried = d_leaving
        if most_cuts is not None:
            is_whole = refs.cuts[row, first_block + j] == 0
            d_carried = jnp.where(is_whole, d_leaving, 0.0)
        rotated = layout.rotate_half(d_carried)
        state = refs.states[0, j]
        is_picked = refs.picked_block[row] == first_block + j
        d_entering = d_carried * same - rotated * swapped + added
        d_entering += jnp.where(is_picked, d_picked, 0.0)
        return d_entering, d_same + state * d_carried, d_swapped + state * rotated

    zero = jnp.zeros((plan.groups, LANES), jnp.float32)
    start = (refs.d_state[...], zero, zero)
    refs.d_state[...], d_same, d_swapped = lax.fori_loop(0, plan.blocks, go_back, start)
    refs.d_decay[:, 0, :] += d_same
    refs.d_decay[:, 1, :] += d_swapped


def _write_gradients(refs: _Refs, plan: Plan, most_cuts: Array | None, group: Array) -> None:
    x_rows = _rows_of_group(refs.x_blocks, plan, group)
    dy_rows = _rows_of_group(refs.dy_blocks, plan, group)
    d_leaving = refs.leaving[pl.ds(group, plan.blocks, stride=plan.state_stride), :]
    d_states = layout.split(layout.one_channel_a_row(d_leaving, plan), plan.exact)
    states = layout.one_channel_a_row(refs.states[0, :, group, :], plan)
    in_last = _in_last(refs, most_cuts)

    dy = _stack(dy_rows, plan, _in_first(refs, most_cuts))
    refs.d_from_state[group] += multiply(layout.split(states, plan.exact), dy, (0, 0), plan)
    x = _stack(x_rows, plan, in_last)
    refs.d_to_state[group] += multiply(d_states, x, (0, 0), plan)
    carried = multiply(d_states, layout.table_of_group(refs.to_state, group), (1, 0), plan)

    mask = layout.toeplitz_mask(plan, keep_upper=False)
    for i, dx in enumerate(jnp.split(carried, plan.group, axis=0)):
        channel = group * plan.group + i
        if in_last is not None:
            dx = jnp.where(in_last, dx, 0.0)
        matrix = layout.toeplitz(refs.taps[channel], mask, plan)
        dx += _leads(refs, plan, most_cuts, dy_rows[i], matrix)
        refs.dx_blocks[pl.ds(channel, plan.blocks, stride=BLOCK_STRIDE), :] = dx
        products = _products_of_tokens(refs, plan, most_cuts, x_rows[i], dy_rows[i])
        refs.d_taps[channel] += layout.fold_diagonals(products)


def _leads(
    refs: _Refs, plan: Plan, most_cuts: Array | None, dy: Array, matrix: tuple[Array, ...]
) -> Array:
    leads = multiply(layout.as_terms(dy, plan.exact), matrix, (1, 0), plan)
    if most_cuts is None:
        return leads

    def replace(number: Array, leads: Array) -> Array:
        is_own = refs.piece_from_end[0] == number
        own = layout.as_terms(jnp.where(is_own, dy, 0.0), plan.exact)
        return jnp.where(is_own, multiply(own, matrix, (1, 0), plan), leads)

    # A token reaches later ones only, so the last piece needs no mask.
    return lax.fori_loop(1, most_cuts + 1, replace, leads)


def _products_of_tokens(
    refs: _Refs, plan: Plan, most_cuts: Array | None, x: Array, dy: Array
) -> Array:
    def products(kept: Array | None) -> Array:
        return multiply(_stack([x], plan, kept), _stack([dy], plan, kept), (0, 0), plan)

    if most_cuts is None:
        total = products(None)
    else:
        total = lax.fori_loop(
            1,
            most_cuts + 1,
            lambda number, total: total + products(refs.piece[0] == number),
            products(refs.piece[0] == 0),
        )
    shape = (BLOCK, BLOCK)
    is_lag = lax.broadcasted_iota(jnp.int32, shape, 1) >= lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.where(is_lag, total, 0.0)
