"""The forward kernel of TimestepNorm on TPU. README.md derives its sums."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import LANES
from pallas_kernels.timestep_norm.pallas_tpu.launch import (
    TileSpecs,
    initialize_scratch,
    launch_over_tiles,
)
from pallas_kernels.timestep_norm.pallas_tpu.layout import (
    GroupSums,
    TimestepNormTpuPlan,
    broadcast_lane,
    repeat_lanes,
)
from pallas_kernels.timestep_norm.pallas_tpu.tile_positions import (
    DOCUMENT_START,
    LATER_DOCUMENT,
    VALID,
    TilePositions,
    zero_padding,
)


class Statistics(NamedTuple):
    """Moments after every token of every group, for the backward pass.

    Attributes:
      pivot: number near the data; without documents one a row, in 128 lanes.
      offset: mean - pivot.
      rstd: 1 / sqrt(var + eps).
    """

    pivot: Float[Array, "B S R #L"]
    offset: Float[Array, "B S R L"]
    rstd: Float[Array, "B S R L"]


class ForwardResult(NamedTuple):
    """Results of `run_forward`.

    Attributes:
      y: normalized input.
      final_moments: mean and var after the row's last token, in all lanes.
      statistics: for the backward pass, if `save_statistics`.
    """

    y: Float[Array, "B L D"]
    final_moments: Float[Array, "B S 2 R 128"]
    statistics: Statistics | None


class _Refs(NamedTuple):
    x: Any
    positions: Any
    initial_moments: Any
    scale: Any
    bias: Any
    y: Any
    final_moments: Any
    transposed: Any
    scale_lanes: Any
    bias_lanes: Any
    mean: Any
    mean_error: Any
    var: Any
    carry: Any
    pivot: Any
    offset: Any
    rstd: Any


# Rows of `initial_moments`, and of `carry`.
STATE_MEAN, STATE_VAR, PRIOR_MEAN, PRIOR_VAR = range(4)
_PIVOT, _TOTAL, _SQUARES, _OFFSET = range(4)


def run_forward(
    plan: TimestepNormTpuPlan,
    x: Float[Array, "B L D"],
    scale: Float[Array, "1 D"],
    bias: Float[Array, "1 D"],
    initial_moments: Float[Array, "B S 4 R 128"],
    positions: Int32[Array, "B 8 L"],
    *,
    save_statistics: bool,
) -> ForwardResult:
    """Runs the forward kernel.

    Args:
      plan: static sizes.
      x: D padded to whole channel steps.
      scale: scale of x's channels.
      bias: bias of x's channels.
      initial_moments: mean and var of the row's initial state, then of the prior.
      positions: from `position_rows`.
      save_statistics: whether a backward pass follows.
    """
    specs = TileSpecs(plan, reverse=False)
    num_rows, shape = x.shape[0], jax.ShapeDtypeStruct
    per_token = (num_rows, plan.channel_steps, plan.group_rows, plan.padded_length)
    final_moments = shape((num_rows, plan.channel_steps, 2, plan.group_rows, LANES), jnp.float32)
    outputs = {
        "y": specs.sequence(shape(x.shape, x.dtype)),
        "final_moments": specs.group_moments(final_moments),
    }
    scratch = _scratch(plan)
    if save_statistics:
        pivots = per_token if plan.is_packed else (*per_token[:3], LANES)
        outputs["pivot"] = specs.pivots(shape(pivots, jnp.float32))
        outputs["offset"] = outputs["rstd"] = specs.statistics(shape(per_token, jnp.float32))
    else:
        scratch["pivot"] = scratch["offset"] = scratch["rstd"] = plan.per_group
    results = launch_over_tiles(
        lambda **refs: _kernel(plan, _Refs(**refs)),
        plan,
        num_rows,
        inputs={
            "x": specs.sequence(x),
            "positions": specs.positions(positions),
            "initial_moments": specs.group_moments(initial_moments),
            "scale": specs.channels(scale),
            "bias": specs.channels(bias),
        },
        outputs=outputs,
        scratch=scratch,
        name="timestep_norm_forward",
    )
    statistics = None
    if save_statistics:
        statistics = Statistics(results["pivot"], results["offset"], results["rstd"])
    return ForwardResult(results["y"], results["final_moments"], statistics)


def _scratch(plan: TimestepNormTpuPlan) -> dict[str, Any]:
    return {
        "transposed": plan.transposed_tile,
        "scale_lanes": plan.per_channel,
        "bias_lanes": plan.per_channel,
        "mean": plan.per_group,
        "mean_error": plan.per_group,
        "var": plan.per_group,
        "carry": pltpu.VMEM((4, plan.group_rows, LANES), jnp.float32),
    }


def _kernel(plan: TimestepNormTpuPlan, refs: _Refs) -> None:
    tile_index = pl.program_id(2)
    initialize_scratch(
        tile_index,
        per_channel=[(refs.scale_lanes, refs.scale), (refs.bias_lanes, refs.bias)],
        # Rows of statistics without a group keep these zeros.
        zeros=[refs.carry, refs.mean, refs.mean_error, refs.var],
    )
    plan.for_lanes(lambda lanes: _find_token_moments(plan, refs, lanes))
    _find_running_moments(plan, refs, tile_index)
    plan.for_lanes(lambda lanes: _write_outputs(plan, refs, lanes))


def _find_token_moments(plan: TimestepNormTpuPlan, refs: _Refs, lanes: Any) -> None:
    """Mean and variance of every token's own numbers."""
    for blocks in plan.whole_group_blocks:
        sums = GroupSums()
        for block in blocks:
            transposed = refs.x[lanes, block.channels].astype(jnp.float32).T
            refs.transposed[block.channels, lanes] = transposed
            for group_slice in block.group_slices:
                sums.add(group_slice.group, refs.transposed[group_slice.channels, lanes])
        means = {group: total / plan.features for group, total in sums.items()}
        # A float32 mean of numbers far from 0 is rounded; `mean_error` is the lost remainder.
        errors, squares = GroupSums(), GroupSums()
        for group_slice in (group_slice for block in blocks for group_slice in block.group_slices):
            group = group_slice.group
            deviation = refs.transposed[group_slice.channels, lanes] - means[group]
            deviation = plan.zero_channel_padding(deviation, group_slice)
            errors.add(group, deviation)
            squares.add(group, jnp.square(deviation))
        for group, mean in means.items():
            row, error = slice(group, group + 1), errors[group] / plan.features
            refs.mean[row, lanes], refs.mean_error[row, lanes] = mean, error
            var = squares[group] / plan.features - jnp.square(error)
            refs.var[row, lanes] = jnp.maximum(var, 0)


def _find_running_moments(plan: TimestepNormTpuPlan, refs: _Refs, tile_index: Array) -> None:
    """Moments after every token, from its own and those before it."""
    tokens = plan.blocks.tokens
    tile = TilePositions.load(plan, refs.positions, tile_index)
    valid, start, later = (tile.has(flag) for flag in (VALID, DOCUMENT_START, LATER_DOCUMENT))
    initial = [repeat_lanes(refs.initial_moments[i], tokens) for i in range(4)]
    carried = [repeat_lanes(refs.carry[i], tokens) for i in range(4)]
    mean = refs.mean[...]
    if plan.is_packed:
        first_mean = tile.running_sums(jnp.where(start, mean, 0))
        initial_mean = jnp.where(later, initial[PRIOR_MEAN], initial[STATE_MEAN])
        initial_var = jnp.where(later, initial[PRIOR_VAR], initial[STATE_VAR])
    else:
        first_mean = repeat_lanes(broadcast_lane(mean, 0), tokens)
        initial_mean, initial_var = initial[STATE_MEAN], initial[STATE_VAR]
    pivot = jnp.where(tile.initial_count > 0, initial_mean, first_mean)
    pivot = jnp.where(tile.starts_before_tile, carried[_PIVOT], pivot)

    difference = jnp.where(valid, (mean - pivot) + refs.mean_error[...], 0)
    total = tile.running_sums(difference)
    total += jnp.where(tile.starts_before_tile, carried[_TOTAL], 0)
    offset = total / tile.count
    previous = jnp.where(tile.lane == 0, carried[_OFFSET], pltpu.roll(offset, 1, 1))
    previous = jnp.where(start, 0, previous)
    share = (tile.count - 1) / tile.count
    summand = refs.var[...] + jnp.square(difference - previous) * share
    squares = tile.running_sums(jnp.where(valid, summand, 0))
    squares += jnp.where(tile.starts_before_tile, carried[_SQUARES], 0)
    var = (tile.initial_count * initial_var + squares) / tile.count

    for i, values in enumerate((pivot, total, squares, offset)):
        refs.carry[i] = broadcast_lane(values, tokens - 1)
    refs.final_moments[0] = broadcast_lane(pivot + offset, tokens - 1)
    refs.final_moments[1] = broadcast_lane(var, tokens - 1)
    refs.pivot[...] = pivot[:, : refs.pivot.shape[1]]
    refs.offset[...] = offset
    refs.rstd[...] = lax.rsqrt(var + plan.eps)


def _write_outputs(plan: TimestepNormTpuPlan, refs: _Refs, lanes: Any) -> None:
    pivot_lanes = lanes if plan.is_packed else slice(None, LANES)
    for block in plan.channel_blocks:
        normalized = []
        for group_slice in block.group_slices:
            channels, row = group_slice.channels, group_slice.row
            pivot, offset = refs.pivot[row, pivot_lanes], refs.offset[row, lanes]
            centered = (refs.transposed[channels, lanes] - pivot) - offset
            normalized.append(centered * refs.rstd[row, lanes])
        y = jnp.concatenate(normalized, axis=0)
        y = y * refs.scale_lanes[block.channels] + refs.bias_lanes[block.channels]
        # Positions beyond a row's end are not written back, so only padding in rows is zeroed.
        y = zero_padding(plan, refs.positions, lanes, y) if plan.is_packed else y
        refs.y[lanes, block.channels] = y.T.astype(refs.y.dtype)
