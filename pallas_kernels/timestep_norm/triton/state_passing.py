"""Launches of the Triton kernels between two passes over x; see `row_splits.state_passing`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common import triton
from pallas_kernels.timestep_norm.row_splits import state_passing
from pallas_kernels.timestep_norm.row_splits.documents import RowInfo
from pallas_kernels.timestep_norm.row_splits.types import TimestepNormGpuOptions
from pallas_kernels.timestep_norm.triton.block_sizes import choose_state_block
from pallas_kernels.timestep_norm.types import MeanVar

MODULE = "pallas_kernels.timestep_norm.triton.state_kernels"


def run_previous_states(
    options: TimestepNormGpuOptions,
    summaries: Float[Array, "B J G 4"] | None,
    initial: MeanVar,
    prior: MeanVar,
    row_info: RowInfo,
) -> Float[Array, "B S G 3"]:
    """Pivot, sum around it and squares before every split."""
    if summaries is None:
        return state_passing.previous_states(options, None, initial, prior, row_info)
    is_packed = row_info.token_info is not None
    first = row_info.initial_count, *initial
    later = row_info.prior_count, *prior
    # The kernel reads neither if all documents start from nothing, and no prior in whole rows.
    first = [summaries] * 3 if options.starts_empty else first
    later = later if is_packed and not options.starts_empty else [summaries] * 3
    return _launch(
        "timestep_norm_previous_states",
        options,
        row_info,
        [summaries, *first, *later],
        summaries,
        summaries.shape[1],
        3,
        {},
    )


def run_next_slopes(
    options: TimestepNormGpuOptions,
    slopes: Float[Array, "B J G 2"] | None,
    pivots: Float[Array, "B S G"],
    states: Float[Array, "B S G 3"],
    final: state_passing.FinalStateGradients | None,
    row_info: RowInfo,
) -> Float[Array, "B S G 2"]:
    """S and T after every split."""
    if slopes is None:
        return state_passing.next_slopes(options, None, pivots, states, final, row_info)
    initial_count = slopes if options.starts_empty else row_info.initial_count
    return _launch(
        "timestep_norm_next_slopes",
        options,
        row_info,
        [slopes, states, pivots, *([slopes] * 3 if final is None else final), initial_count],
        slopes,
        options.geometry.splits,
        2,
        {"HAS_FINAL": final is not None},
    )


def _launch(
    name: str,
    options: TimestepNormGpuOptions,
    row_info: RowInfo,
    operands: list[Array],
    unread: Array,
    scanned: int,
    numbers: int,
    constants: dict[str, Any],
) -> Array:
    """Runs a kernel that scans `scanned` splits and writes some numbers for every split."""
    geometry = options.geometry
    rows, splits, groups = geometry.rows, geometry.splits, geometry.groups
    block = choose_state_block(scanned)
    token_info = unread if row_info.token_info is None else row_info.token_info
    (result,) = triton.launch(
        getattr(triton.load_kernels(MODULE, interpret=options.interpret), name),
        [*operands, token_info, geometry.tiles, geometry.tiles_per_split, splits],
        [jax.ShapeDtypeStruct((rows, splits, groups, numbers), jnp.float32)],
        grid=(-(-groups // block.groups), rows),
        constants={
            "GROUPS": groups,
            "GB": block.groups,
            "SPLITS": block.splits,
            "PACKED": row_info.token_info is not None,
            "STARTS_EMPTY": options.starts_empty,
            **constants,
        },
        num_warps=block.warps,
        interpret=options.interpret,
    )
    return result
