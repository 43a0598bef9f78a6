"""CEMA's forward kernel for TPU.

A grid step takes 128 channels through a tile of blocks of T = 128 tokens: transpose; project every
block's tokens to the state that they add; the recurrence over blocks, for all channels at once;
lags and previous states to outputs; transpose back. The state stays in scratch for the next tile.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.cema.pallas_tpu import layout, products
from pallas_kernels.cema.pallas_tpu.launch import CemaKernelCall
from pallas_kernels.cema.pallas_tpu.layout import (
    BLOCK_STRIDE,
    CHANNELS,
    LANES,
    CemaTpuDocuments,
    CemaTpuPlan,
)
from pallas_kernels.cema.pallas_tpu.tables import (
    TableParams,
    TableRefs,
    make_tables,
    table_scratch,
)
from pallas_kernels.cema.pallas_tpu.tile import (
    CemaTpuTile,
    DocumentRefs,
    for_groups,
    multiply_by_toeplitz,
    run_tile,
)


class CemaTpuOutputs(NamedTuple):
    """Results of the forward kernel.

    Attributes:
      y: the output.
      selected_state: the state before each row's block `selected_block`.
      previous_states: the states before all blocks, or None.
    """

    y: Float[Array, "B L D"]
    selected_state: Float[Array, "B G 128"]
    previous_states: Float[Array, "B J G 128"] | None


class _ForwardRefs(NamedTuple):
    selected_block: Any
    x: Any
    initial: Any
    y: Any
    selected_state: Any
    x_blocks: Any
    y_blocks: Any
    block_states: Any  # what every block adds, then the state before it
    state: Any
    tables: TableRefs
    documents: DocumentRefs
    previous_states: Any = None


def cema_forward(
    x: Float[Array, "B L D"],
    table_params: TableParams,
    initial: Float[Array, "B G 128"],
    documents: CemaTpuDocuments | None,
    selected_block: Int32[Array, " B"],
    plan: CemaTpuPlan,
    *,
    save_states: bool,
) -> CemaTpuOutputs:
    """y[t] = Σ_τ K[τ] x[t-τ] + Re Σ_n G[t] H[j], H[j+1] = A H[j] + Σ_t W[t] x[t] (README.md).

    Args:
      x: bfloat16, or float32 if the plan is exact; D a multiple of 128, L at least one tile.
      table_params: from `make_table_params`.
      initial: the state before every row.
      documents: segment pieces, or None.
      selected_block: the block of every row whose previous state is wanted.
      plan: what the kernel is specialised for.
      save_states: whether to return the states that the backward kernel needs.
    """
    call = CemaKernelCall(plan, x.shape, selected_block, documents, backward=False)
    call.inputs |= {"x": call.sequence(x), "initial": call.row_state(initial)}
    call.add_table_params(table_params)
    call.add_outputs(
        y=call.sequence(jax.ShapeDtypeStruct(x.shape, x.dtype)),
        selected_state=call.row_state(jax.ShapeDtypeStruct(initial.shape, jnp.float32)),
    )
    if save_states:
        shape = (x.shape[0], plan.num_tiles * plan.blocks, *initial.shape[1:])
        states = jax.ShapeDtypeStruct(shape, jnp.float32)
        call.add_outputs(previous_states=call.block_states(states))
    blocks = pltpu.VMEM((plan.blocks * BLOCK_STRIDE, CHANNELS), jnp.float32)
    scratch = {
        "x_blocks": blocks,
        "y_blocks": blocks,
        "block_states": pltpu.VMEM((plan.blocks * plan.state_stride, LANES), jnp.float32),
        "state": pltpu.VMEM((plan.num_groups, LANES), jnp.float32),
        **table_scratch(plan),
    }
    results = call.run(
        partial(_kernel, plan=plan), _ForwardRefs, scratch, name="cema_forward", products=3
    )
    return CemaTpuOutputs(results["y"], results["selected_state"], results.get("previous_states"))


def _kernel(refs: _ForwardRefs, plan: CemaTpuPlan) -> None:
    row, tile = pl.program_id(1), pl.program_id(2)

    @pl.when((row == 0) & (tile == 0))
    def _start_channels() -> None:
        for_groups(plan, lambda group: make_tables(refs.tables, group, plan, reversed_taps=False))

    @pl.when(tile == 0)
    def _start_row() -> None:
        refs.state[...] = refs.initial[0]

    piece = refs.documents.piece
    layout.load_transposed(refs.x, refs.x_blocks, piece, tile, plan)
    run_tile(_compute, refs, plan, row, tile)
    layout.store_transposed(refs.y_blocks, refs.y, piece, plan)


def _compute(tile: CemaTpuTile) -> None:
    for_groups(tile.plan, partial(_project_blocks, tile))
    _scan_blocks(tile)
    for_groups(tile.plan, partial(_write_outputs, tile))


def _project_blocks(tile: CemaTpuTile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    rows = layout.group_rows(refs.x_blocks, group, plan)
    rows = [layout.zero_unless(tile.in_last, row) for row in rows]
    added = products.project_to_state(rows, refs.tables.to_state, group, plan)
    refs.block_states[layout.group_states(group, plan), :] = added


def _scan_blocks(tile: CemaTpuTile) -> None:
    refs, plan = tile.refs, tile.plan
    decays = refs.tables.decay
    same, swapped = decays[:, 0, :], decays[:, 1, :]

    def decay(state: Array) -> Array:
        return state * same + layout.rotate_half(state) * swapped

    def advance(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        state, *decayed_start = carry
        where = layout.block_states(j, plan)
        added = refs.block_states[where, :]
        # In place: the state before the block overwrites what the block adds.
        refs.block_states[where, :] = state
        if refs.previous_states is not None:
            refs.previous_states[0, j] = state
        carried = layout.zero_unless(tile.passes_state_through(j), decay(state))
        return (carried + added, *map(decay, decayed_start))

    start = refs.state[...]
    carry = (start, start) if tile.corrects_decay else (start,)
    end, *decayed_start = lax.fori_loop(0, plan.blocks, advance, carry)
    if decayed_start:
        exact = start * decays[:, 2, :] + layout.rotate_half(start) * decays[:, 3, :]
        end += exact - decayed_start[0]
    refs.state[...] = end
    selected = refs.selected_block[tile.row]

    @pl.when(selected // plan.blocks == tile.index)
    def _store_selected() -> None:
        where = layout.block_states(selected % plan.blocks, plan)
        refs.selected_state[0] = refs.block_states[where, :]


def _write_outputs(tile: CemaTpuTile, group: Array) -> None:
    refs, plan = tile.refs, tile.plan
    mask = layout.toeplitz_mask(plan, keep_upper=True)
    previous = refs.block_states[layout.group_states(group, plan), :]
    carried = products.project_to_output(previous, refs.tables.from_state, group, plan)
    for i, y in enumerate(carried):
        channel = group * plan.group_size + i
        x = refs.x_blocks[layout.channel_blocks(channel, plan), :]
        matrix = layout.toeplitz(refs.tables.taps[channel], mask, plan)
        # Lags reach earlier tokens only, so pieces count from the block's first.
        lags = multiply_by_toeplitz(tile, x, matrix, refs.documents.piece)
        y = layout.zero_unless(tile.in_first, y)
        refs.y_blocks[layout.channel_blocks(channel, plan), :] = y + lags
