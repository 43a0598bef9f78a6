"""CEMA's backward kernel for TPU: the forward kernel transposed, from a row's end to its start."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.cema.pallas_tpu import layout, products
from pallas_kernels.cema.pallas_tpu.launch import Frame, Tile, run_tile
from pallas_kernels.cema.pallas_tpu.layout import (
    BLOCK,
    BLOCK_STRIDE,
    CHANNELS,
    LANES,
    Documents,
    Plan,
    multiply,
)
from pallas_kernels.cema.pallas_tpu.tables import (
    MOMENTS,
    TableSeeds,
    make_tables,
    seed_gradients,
    sum_up_moments,
    table_scratch,
)


class BackwardResult(NamedTuple):
    """Gradients of what `cema_forward` took."""

    x: Float[Array, "B L D"]
    seeds: TableSeeds
    initial: Float[Array, "B G 128"]


class _Refs(NamedTuple):
    picked_block: Any
    x: Any
    dy: Any
    states: Any
    factors: Any
    starts: Any
    omega: Any
    decay: Any
    d_picked: Any
    dx: Any
    d_initial: Any
    moments: Any
    d_decay: Any
    x_blocks: Any
    dy_blocks: Any
    dx_blocks: Any
    leaving: Any
    d_state: Any
    to_state: Any
    from_state: Any
    taps: Any
    d_to_state: Any
    d_from_state: Any
    d_taps: Any
    cuts: Any = None
    most_cuts: Any = None
    piece: Any = None
    piece_from_end: Any = None


def cema_backward(
    x: Float[Array, "B L D"],
    dy: Float[Array, "B L D"],
    d_picked: Float[Array, "B G 128"],
    states: Float[Array, "B J G 128"],
    seeds: TableSeeds,
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
      seeds: as in the forward kernel.
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
    frame.add_seeds(seeds)
    frame.add_outputs(
        dx=frame.sequence(jax.ShapeDtypeStruct(x.shape, x.dtype)),
        d_initial=frame.row_state(jax.ShapeDtypeStruct(d_picked.shape, jnp.float32)),
    )
    groups = seeds.decay.shape[0]
    frame.add_sums(moments=(groups, MOMENTS, LANES), d_decay=(groups, 2, LANES))
    blocks = pltpu.VMEM((plan.blocks * BLOCK_STRIDE, CHANNELS), jnp.float32)
    scratch = {
        "x_blocks": blocks,
        "dy_blocks": blocks,
        "dx_blocks": blocks,
        "leaving": pltpu.VMEM((plan.blocks * plan.state_stride, LANES), jnp.float32),
        "d_state": pltpu.VMEM((plan.groups, LANES), jnp.float32),
        **table_scratch(plan),
        "d_to_state": pltpu.VMEM((plan.groups, LANES, BLOCK), jnp.float32),
        "d_from_state": pltpu.VMEM((plan.groups, LANES, BLOCK), jnp.float32),
        "d_taps": pltpu.VMEM((CHANNELS, layout.SUBLANES, BLOCK), jnp.float32),
    }
    results = frame.call(
        lambda refs: _kernel(refs, plan), _Refs, scratch, name="cema_backward", products=6
    )
    d_seeds = seed_gradients(results["moments"], results["d_decay"], seeds, plan)
    return BackwardResult(results["dx"], d_seeds, results["d_initial"])


def _kernel(refs: _Refs, plan: Plan) -> None:
    row, step = pl.program_id(1), pl.program_id(2)
    number = plan.tiles - 1 - step

    @pl.when(step == 0)
    def _start_row() -> None:
        refs.d_state[...] = jnp.zeros_like(refs.d_state)

    @pl.when((step == 0) & (row == 0))
    def _start_channels() -> None:
        for ref in (refs.d_taps, refs.d_to_state, refs.d_from_state, refs.d_decay):
            ref[...] = jnp.zeros_like(ref)
        Tile(refs, plan, row, step, None).for_groups(
            lambda _, group: make_tables(refs, group, plan, reversed_taps=True)
        )

    layout.load_transposed(refs.x, refs.x_blocks, refs.piece, number, plan)
    layout.load_transposed(refs.dy, refs.dy_blocks, refs.piece, number, plan)
    run_tile(_compute, refs, plan, row, number)
    layout.store_transposed(refs.dx_blocks, refs.dx, refs.piece, plan)

    @pl.when(step == plan.tiles - 1)
    def _finish_row() -> None:
        refs.d_initial[0] = refs.d_state[...]

    @pl.when((step == plan.tiles - 1) & (row == pl.num_programs(1) - 1))
    def _finish_channels() -> None:
        Tile(refs, plan, row, step, None).for_groups(
            lambda _, group: sum_up_moments(refs, group, plan)
        )


def _compute(tile: Tile) -> None:
    tile.for_groups(_sum_up_blocks)
    _scan_blocks(tile)
    tile.for_groups(_add_to_tables)
    tile.for_groups(_write_dx)
    tile.for_groups(_add_to_taps)


def _sum_up_blocks(tile: Tile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    rows = layout.group_rows(refs.dy_blocks, group, plan)
    rows = [layout.zero_unless(tile.in_first, row) for row in rows]
    added = products.sum_up(rows, refs.from_state, group, plan)
    refs.leaving[layout.group_states(group, plan), :] = added


def _scan_blocks(tile: Tile) -> None:
    refs, plan = tile.refs, tile.plan
    same, swapped = refs.decay[:, 0, :], refs.decay[:, 1, :]
    d_picked = refs.d_picked[0]
    picked = refs.picked_block[tile.row] - tile.number * plan.blocks

    def decay(d_leaving: Array) -> Array:
        return d_leaving * same - layout.rotate_half(d_leaving) * swapped

    def go_back(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        d_leaving, d_same, d_swapped, *alone = carry
        j = plan.blocks - 1 - i
        where = layout.block_states(j, plan)
        added = refs.leaving[where, :] + jnp.where(j == picked, d_picked, 0.0)
        # The gradient of the state after a block takes the place of what the block adds.
        refs.leaving[where, :] = d_leaving
        d_carried = layout.zero_unless(tile.is_whole(j), d_leaving)
        state = refs.states[0, j]
        d_same += state * d_carried
        d_swapped += state * layout.rotate_half(d_carried)
        return (decay(d_carried) + added, d_same, d_swapped, *map(decay, alone))

    zero = jnp.zeros((plan.groups, LANES), jnp.float32)
    last = refs.d_state[...]
    carry = (last, zero, zero, last) if tile.corrects_decay else (last, zero, zero)
    first, d_same, d_swapped, *alone = lax.fori_loop(0, plan.blocks, go_back, carry)
    if alone:
        tile_decay = last * refs.decay[:, 2, :] - layout.rotate_half(last) * refs.decay[:, 3, :]
        first += tile_decay - alone[0]
    refs.d_state[...] = first
    refs.d_decay[:, 0, :] += d_same
    refs.d_decay[:, 1, :] += d_swapped


def _add_to_tables(tile: Tile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    for gradient, states, tokens, kept in (
        (refs.d_from_state, refs.states[0, :, group, :], refs.dy_blocks, tile.in_first),
        (refs.d_to_state, _leaving(tile, group), refs.x_blocks, tile.in_last),
    ):
        rows = [layout.zero_unless(kept, row) for row in layout.group_rows(tokens, group, plan)]
        gradient[group] += products.table_gradient(states, rows, plan)


def _write_dx(tile: Tile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    mask = layout.toeplitz_mask(plan, keep_upper=False)
    carried = products.read_out(_leaving(tile, group), refs.to_state, group, plan)
    for i, dx in enumerate(carried):
        channel = group * plan.group + i
        where = layout.channel_blocks(channel, plan)
        matrix = layout.toeplitz(refs.taps[channel], mask, plan)
        leads = _leads(tile, refs.dy_blocks[where, :], matrix)
        refs.dx_blocks[where, :] = layout.zero_unless(tile.in_last, dx) + leads


def _add_to_taps(tile: Tile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    for i in range(plan.group):
        channel = group * plan.group + i
        where = layout.channel_blocks(channel, plan)
        by_pairs = _sum_over_pairs(tile, refs.x_blocks[where, :], refs.dy_blocks[where, :])
        refs.d_taps[channel] += layout.fold_diagonals(by_pairs)


def _leaving(tile: Tile, group: Array) -> Array:
    return tile.refs.leaving[layout.group_states(group, tile.plan), :]


def _leads(tile: Tile, dy: Array, matrix: tuple[Array, ...]) -> Array:
    plan = tile.plan
    leads = multiply(layout.stack([dy], plan), matrix, (1, 0), plan)
    if tile.most_cuts is None:
        return leads

    def replace(number: Array, leads: Array) -> Array:
        is_own = tile.refs.piece_from_end[0] == number
        own = layout.stack([jnp.where(is_own, dy, 0.0)], plan)
        return jnp.where(is_own, multiply(own, matrix, (1, 0), plan), leads)

    # A token reaches later ones only, so the last piece needs no mask.
    return lax.fori_loop(1, tile.most_cuts + 1, replace, leads)


def _sum_over_pairs(tile: Tile, x: Array, dy: Array) -> Array:
    def sum_over_blocks(kept: Array | None) -> Array:
        left, right = (
            layout.stack([layout.zero_unless(kept, rows)], tile.plan) for rows in (x, dy)
        )
        return multiply(left, right, (0, 0), tile.plan)

    def add_piece(number: Array, total: Array) -> Array:
        return total + sum_over_blocks(tile.refs.piece[0] == number)

    total = sum_over_blocks(tile.in_first)
    if tile.most_cuts is not None:
        total = lax.fori_loop(1, tile.most_cuts + 1, add_piece, total)
    row = lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 0)
    column = lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 1)
    return jnp.where(column >= row, total, 0.0)
