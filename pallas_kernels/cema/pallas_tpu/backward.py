"""CEMA's backward kernel for TPU: the forward kernel transposed, from a row's end to its start."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.cema.pallas_tpu import layout, products
from pallas_kernels.cema.pallas_tpu.launch import CemaKernelCall
from pallas_kernels.cema.pallas_tpu.layout import (
    BLOCK,
    BLOCK_STRIDE,
    CHANNELS,
    LANES,
    CemaTpuDocuments,
    CemaTpuPlan,
    multiply,
)
from pallas_kernels.cema.pallas_tpu.tables import (
    MOMENTS,
    TableParams,
    TableRefs,
    make_tables,
    sum_moments,
    table_param_gradients,
    table_scratch,
)
from pallas_kernels.cema.pallas_tpu.tile import (
    CemaTpuTile,
    DocumentRefs,
    for_groups,
    multiply_by_toeplitz,
    run_tile,
)


class CemaTpuGradients(NamedTuple):
    """Gradients of the arguments of `cema_forward`."""

    x: Float[Array, "B L D"]
    table_params: TableParams
    initial: Float[Array, "B G 128"]


class _BackwardRefs(NamedTuple):
    selected_block: Any
    x: Any
    dy: Any
    previous_states: Any
    d_selected_state: Any
    dx: Any
    d_initial: Any
    moments: Any
    d_decay: Any
    x_blocks: Any
    dy_blocks: Any
    dx_blocks: Any
    d_block_states: Any  # what dy of a block adds, then the gradient of the state after the block
    d_state: Any
    d_to_state: Any
    d_from_state: Any
    d_taps: Any
    tables: TableRefs
    documents: DocumentRefs


def cema_backward(
    x: Float[Array, "B L D"],
    dy: Float[Array, "B L D"],
    d_selected_state: Float[Array, "B G 128"],
    previous_states: Float[Array, "B J G 128"],
    table_params: TableParams,
    documents: CemaTpuDocuments | None,
    selected_block: Int32[Array, " B"],
    plan: CemaTpuPlan,
) -> CemaTpuGradients:
    """dH[j] = conj(A) dH[j+1] + Σ_t conj(G[t]) dy[t], and from it all gradients (README.md).

    Args:
      x: as in the forward kernel.
      dy: gradient of y, in its dtype.
      d_selected_state: gradient of `selected_state`.
      previous_states: from the forward kernel, at least as many blocks as the plan has.
      table_params: as in the forward kernel.
      documents: as in the forward kernel.
      selected_block: as in the forward kernel.
      plan: what the kernel is specialised for.
    """
    call = CemaKernelCall(plan, x.shape, selected_block, documents, backward=True)
    call.inputs |= {
        "x": call.sequence(x),
        "dy": call.sequence(dy),
        "previous_states": call.block_states(previous_states),
        "d_selected_state": call.row_state(d_selected_state),
    }
    call.add_table_params(table_params)
    call.add_outputs(
        dx=call.sequence(jax.ShapeDtypeStruct(x.shape, x.dtype)),
        d_initial=call.row_state(jax.ShapeDtypeStruct(d_selected_state.shape, jnp.float32)),
    )
    groups = table_params.decay.shape[0]
    call.add_sums(moments=(groups, MOMENTS, LANES), d_decay=(groups, 2, LANES))
    blocks = pltpu.VMEM((plan.blocks * BLOCK_STRIDE, CHANNELS), jnp.float32)
    scratch = {
        "x_blocks": blocks,
        "dy_blocks": blocks,
        "dx_blocks": blocks,
        "d_block_states": pltpu.VMEM((plan.blocks * plan.state_stride, LANES), jnp.float32),
        "d_state": pltpu.VMEM((plan.num_groups, LANES), jnp.float32),
        **table_scratch(plan),
        "d_to_state": pltpu.VMEM((plan.num_groups, LANES, BLOCK), jnp.float32),
        "d_from_state": pltpu.VMEM((plan.num_groups, LANES, BLOCK), jnp.float32),
        "d_taps": pltpu.VMEM((CHANNELS, layout.SUBLANES, BLOCK), jnp.float32),
    }
    results = call.run(
        partial(_kernel, plan=plan), _BackwardRefs, scratch, name="cema_backward", products=6
    )
    d_table_params = table_param_gradients(
        results["moments"], results["d_decay"], table_params, plan
    )
    return CemaTpuGradients(results["dx"], d_table_params, results["d_initial"])


def _kernel(refs: _BackwardRefs, plan: CemaTpuPlan) -> None:
    row, step = pl.program_id(1), pl.program_id(2)
    tile = plan.num_tiles - 1 - step

    @pl.when(step == 0)
    def _start_row() -> None:
        refs.d_state[...] = jnp.zeros_like(refs.d_state)

    @pl.when((step == 0) & (row == 0))
    def _start_channels() -> None:
        for ref in (refs.d_taps, refs.d_to_state, refs.d_from_state, refs.d_decay):
            ref[...] = jnp.zeros_like(ref)
        for_groups(plan, lambda group: make_tables(refs.tables, group, plan, reversed_taps=True))

    piece = refs.documents.piece
    layout.load_transposed(refs.x, refs.x_blocks, piece, tile, plan)
    layout.load_transposed(refs.dy, refs.dy_blocks, piece, tile, plan)
    run_tile(_compute, refs, plan, row, tile)
    layout.store_transposed(refs.dx_blocks, refs.dx, piece, plan)

    @pl.when(step == plan.num_tiles - 1)
    def _finish_row() -> None:
        refs.d_initial[0] = refs.d_state[...]

    @pl.when((step == plan.num_tiles - 1) & (row == pl.num_programs(1) - 1))
    def _finish_channels() -> None:
        for_groups(plan, lambda group: sum_moments(refs, group, plan))


def _compute(tile: CemaTpuTile) -> None:
    plan = tile.plan
    for_groups(plan, partial(_project_blocks, tile))
    _scan_blocks(tile)
    for_groups(plan, partial(_add_to_tables, tile))
    for_groups(plan, partial(_write_dx, tile))
    for_groups(plan, partial(_add_to_taps, tile))


def _project_blocks(tile: CemaTpuTile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    rows = layout.group_rows(refs.dy_blocks, group, plan)
    rows = [layout.zero_unless(tile.in_first, row) for row in rows]
    added = products.project_to_state(rows, refs.tables.from_state, group, plan)
    refs.d_block_states[layout.group_states(group, plan), :] = added


def _scan_blocks(tile: CemaTpuTile) -> None:
    refs, plan = tile.refs, tile.plan
    decays = refs.tables.decay
    same, swapped = decays[:, 0, :], decays[:, 1, :]
    d_selected_state = refs.d_selected_state[0]
    selected = refs.selected_block[tile.row] - tile.index * plan.blocks

    def decay(d_next: Array) -> Array:
        return d_next * same - layout.rotate_half(d_next) * swapped

    def go_back(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        d_next, d_same, d_swapped, *decayed_last = carry
        j = plan.blocks - 1 - i
        where = layout.block_states(j, plan)
        added = refs.d_block_states[where, :] + jnp.where(j == selected, d_selected_state, 0.0)
        # In place: the gradient of the state after the block overwrites what the block adds.
        refs.d_block_states[where, :] = d_next
        d_carried = layout.zero_unless(tile.passes_state_through(j), d_next)
        state = refs.previous_states[0, j]
        d_same += state * d_carried
        d_swapped += state * layout.rotate_half(d_carried)
        return (decay(d_carried) + added, d_same, d_swapped, *map(decay, decayed_last))

    zero = jnp.zeros((plan.num_groups, LANES), jnp.float32)
    last = refs.d_state[...]
    carry = (last, zero, zero, last) if tile.corrects_decay else (last, zero, zero)
    first, d_same, d_swapped, *decayed_last = lax.fori_loop(0, plan.blocks, go_back, carry)
    if decayed_last:
        exact = last * decays[:, 2, :] - layout.rotate_half(last) * decays[:, 3, :]
        first += exact - decayed_last[0]
    refs.d_state[...] = first
    refs.d_decay[:, 0, :] += d_same
    refs.d_decay[:, 1, :] += d_swapped


def _add_to_tables(tile: CemaTpuTile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    previous = refs.previous_states[0, :, group, :]
    for gradient, states, tokens, mask in (
        (refs.d_from_state, previous, refs.dy_blocks, tile.in_first),
        (refs.d_to_state, _d_next_states(tile, group), refs.x_blocks, tile.in_last),
    ):
        rows = [layout.zero_unless(mask, row) for row in layout.group_rows(tokens, group, plan)]
        gradient[group] += products.table_gradient(states, rows, plan)


def _write_dx(tile: CemaTpuTile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    mask = layout.toeplitz_mask(plan, keep_upper=False)
    d_next = _d_next_states(tile, group)
    carried = products.project_to_output(d_next, refs.tables.to_state, group, plan)
    for i, dx in enumerate(carried):
        channel = group * plan.group_size + i
        where = layout.channel_blocks(channel, plan)
        matrix = layout.toeplitz(refs.tables.taps[channel], mask, plan)
        # Gradients come from later tokens only, so pieces count from the block's last.
        later = multiply_by_toeplitz(
            tile, refs.dy_blocks[where, :], matrix, refs.documents.piece_from_end
        )
        refs.dx_blocks[where, :] = layout.zero_unless(tile.in_last, dx) + later


def _add_to_taps(tile: CemaTpuTile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    for i in range(plan.group_size):
        channel = group * plan.group_size + i
        where = layout.channel_blocks(channel, plan)
        by_pairs = _sum_over_pairs(tile, refs.x_blocks[where, :], refs.dy_blocks[where, :])
        refs.d_taps[channel] += layout.fold_diagonals(by_pairs)


def _d_next_states(tile: CemaTpuTile, group: Array) -> Float[Array, "J 128"]:
    return tile.refs.d_block_states[layout.group_states(group, tile.plan), :]


def _sum_over_pairs(
    tile: CemaTpuTile, x: Float[Array, "J T"], dy: Float[Array, "J T"]
) -> Float[Array, "T T"]:
    """Σ_j x[j, s] dy[j, t] for s <= t in one segment piece."""

    def sum_over_blocks(mask: Bool[Array, "J T"] | None) -> Array:
        left, right = (
            layout.stack([layout.zero_unless(mask, rows)], tile.plan) for rows in (x, dy)
        )
        return multiply(left, right, (0, 0), tile.plan)

    def add_piece(number: Array, total: Array) -> Array:
        return total + sum_over_blocks(tile.refs.documents.piece[0] == number)

    total = sum_over_blocks(tile.in_first)
    if tile.most_cuts is not None:
        total = lax.fori_loop(1, tile.most_cuts + 1, add_piece, total)
    row = lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 0)
    column = lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 1)
    return jnp.where(column >= row, total, 0.0)
