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

from pallas_kernels.cema.pallas_tpu import layout, products
from pallas_kernels.cema.pallas_tpu.launch import Frame, Tile, run_tile
from pallas_kernels.cema.pallas_tpu.layout import (
    BLOCK_STRIDE,
    CHANNELS,
    LANES,
    Documents,
    Plan,
    multiply,
)
from pallas_kernels.cema.pallas_tpu.tables import TableSeeds, make_tables, table_scratch


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
    factors: Any
    starts: Any
    omega: Any
    decay: Any
    initial: Any
    y: Any
    picked: Any
    x_blocks: Any
    y_blocks: Any
    entering: Any
    state: Any
    to_state: Any
    from_state: Any
    taps: Any
    states: Any = None
    cuts: Any = None
    most_cuts: Any = None
    piece: Any = None
    piece_from_end: Any = None


def cema_forward(
    x: Float[Array, "B L D"],
    seeds: TableSeeds,
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
      seeds: from `table_seeds`.
      initial: the state before every row.
      documents: where documents begin and end, or None.
      picked_block: the block of every row whose entering state is wanted.
      plan: what the kernel is specialised for.
      save_states: whether to return the states that the backward kernel needs.
    """
    frame = Frame(plan, x.shape, picked_block, documents, backward=False)
    frame.inputs |= {"x": frame.sequence(x), "initial": frame.row_state(initial)}
    frame.add_seeds(seeds)
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
        **table_scratch(plan),
    }
    results = frame.call(
        lambda refs: _kernel(refs, plan), _Refs, scratch, name="cema_forward", products=3
    )
    return ForwardResult(results["y"], results["picked"], results.get("states"))


def _kernel(refs: _Refs, plan: Plan) -> None:
    row, step = pl.program_id(1), pl.program_id(2)

    @pl.when((row == 0) & (step == 0))
    def _start_channels() -> None:
        Tile(refs, plan, row, step, None).for_groups(
            lambda _, group: make_tables(refs, group, plan, reversed_taps=False)
        )

    @pl.when(step == 0)
    def _start_row() -> None:
        refs.state[...] = refs.initial[0]

    layout.load_transposed(refs.x, refs.x_blocks, refs.piece, step, plan)
    run_tile(_compute, refs, plan, row, step)
    layout.store_transposed(refs.y_blocks, refs.y, refs.piece, plan)


def _compute(tile: Tile) -> None:
    tile.for_groups(_sum_up_blocks)
    _scan_blocks(tile)
    tile.for_groups(_write_outputs)


def _sum_up_blocks(tile: Tile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    rows = layout.group_rows(refs.x_blocks, group, plan)
    rows = [layout.zero_unless(tile.in_last, row) for row in rows]
    added = products.sum_up(rows, refs.to_state, group, plan)
    refs.entering[layout.group_states(group, plan), :] = added


def _scan_blocks(tile: Tile) -> None:
    refs, plan = tile.refs, tile.plan
    same, swapped = refs.decay[:, 0, :], refs.decay[:, 1, :]

    def decay(state: Array) -> Array:
        return state * same + layout.rotate_half(state) * swapped

    def advance(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        state, *alone = carry
        where = layout.block_states(j, plan)
        added = refs.entering[where, :]
        # A state takes the place of what its block adds.
        refs.entering[where, :] = state
        if refs.states is not None:
            refs.states[0, j] = state
        carried = layout.zero_unless(tile.is_whole(j), decay(state))
        return (carried + added, *map(decay, alone))

    start = refs.state[...]
    carry = (start, start) if tile.corrects_decay else (start,)
    end, *alone = lax.fori_loop(0, plan.blocks, advance, carry)
    if alone:
        tile_decay = start * refs.decay[:, 2, :] + layout.rotate_half(start) * refs.decay[:, 3, :]
        end += tile_decay - alone[0]
    refs.state[...] = end
    picked = refs.picked_block[tile.row]

    @pl.when(picked // plan.blocks == tile.number)
    def _keep_picked() -> None:
        refs.picked[0] = refs.entering[layout.block_states(picked % plan.blocks, plan), :]


def _write_outputs(tile: Tile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    mask = layout.toeplitz_mask(plan, keep_upper=True)
    entering = refs.entering[layout.group_states(group, plan), :]
    carried = products.read_out(entering, refs.from_state, group, plan)
    for i, y in enumerate(carried):
        channel = group * plan.group + i
        x = refs.x_blocks[layout.channel_blocks(channel, plan), :]
        matrix = layout.toeplitz(refs.taps[channel], mask, plan)
        lags = _lags(tile, x, matrix)
        y = layout.zero_unless(tile.in_first, y)
        refs.y_blocks[layout.channel_blocks(channel, plan), :] = y + lags


def _lags(tile: Tile, x: Array, matrix: tuple[Array, ...]) -> Array:
    plan = tile.plan
    lags = multiply(layout.stack([x], plan), matrix, (1, 0), plan)
    if tile.most_cuts is None:
        return lags

    def replace(number: Array, lags: Array) -> Array:
        is_own = tile.refs.piece[0] == number
        own = layout.stack([jnp.where(is_own, x, 0.0)], plan)
        return jnp.where(is_own, multiply(own, matrix, (1, 0), plan), lags)

    # Lags reach back only, so the first piece needs no mask.
    return lax.fori_loop(1, tile.most_cuts + 1, replace, lags)
