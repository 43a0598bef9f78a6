"""The backward kernel of TimestepNorm on TPU. README.md derives its sums."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import LANES
from pallas_kernels.timestep_norm.pallas_tpu.forward import Statistics
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
    FINAL_TOKEN,
    LATER_DOCUMENT,
    VALID,
    TilePositions,
    zero_padding,
)


class Gradients(NamedTuple):
    """Results of `run_backward`.

    Attributes:
      x: gradient of x.
      scale: gradient of scale from every row.
      bias: gradient of bias from every row.
      initial_moments: gradients of mean and var of the row's initial state, then of the prior; the
        sum over the lanes is still to be taken.
    """

    x: Float[Array, "B L D"]
    scale: Float[Array, "B 1 D"]
    bias: Float[Array, "B 1 D"]
    initial_moments: Float[Array, "B S 4 R 128"]


class _Refs(NamedTuple):
    x: Any
    dy: Any
    positions: Any
    d_final: Any
    scale: Any
    pivot: Any
    offset: Any
    rstd: Any
    dx: Any
    d_scale: Any
    d_bias: Any
    d_initial: Any
    centered: Any
    g: Any
    scale_lanes: Any
    scale_sums: Any
    bias_sums: Any
    g_sums: Any
    product_sums: Any
    centered_means: Any
    constant: Any
    slope: Any
    carry: Any


# Rows of `carry`.
_MEAN_SUM, _VAR_SUM, _DRIFT_SUM = range(3)


def run_backward(
    plan: TimestepNormTpuPlan,
    x: Float[Array, "B L D"],
    dy: Float[Array, "B L D"],
    d_final: Float[Array, "B S 2 R 128"],
    scale: Float[Array, "1 D"],
    statistics: Statistics,
    positions: Int32[Array, "B 8 L"],
) -> Gradients:
    """Runs the backward kernel.

    Args:
      plan: static sizes.
      x: the input of the forward kernel.
      dy: cotangent of y.
      d_final: cotangents of the mean and var after the row's last token.
      scale: the scale of the forward kernel.
      statistics: results of the forward kernel.
      positions: from `position_rows`.
    """
    num_rows, shape = x.shape[0], jax.ShapeDtypeStruct
    specs = TileSpecs(plan, reverse=True)
    per_channel = shape((num_rows, 1, x.shape[2]), jnp.float32)
    initial = shape((num_rows, plan.channel_steps, 4, plan.group_rows, LANES), jnp.float32)
    results = launch_over_tiles(
        lambda **refs: _kernel(plan, _Refs(**refs)),
        plan,
        num_rows,
        inputs={
            "x": specs.sequence(x),
            "dy": specs.sequence(dy),
            "positions": specs.positions(positions),
            "d_final": specs.group_moments(d_final),
            "scale": specs.channels(scale),
            "pivot": specs.pivots(statistics.pivot),
            "offset": specs.statistics(statistics.offset),
            "rstd": specs.statistics(statistics.rstd),
        },
        outputs={
            "dx": specs.sequence(shape(x.shape, x.dtype)),
            "d_scale": specs.row_channels(per_channel),
            "d_bias": specs.row_channels(per_channel),
            "d_initial": specs.group_moments(initial),
        },
        scratch=_scratch(plan),
        name="timestep_norm_backward",
    )
    return Gradients(results["dx"], results["d_scale"], results["d_bias"], results["d_initial"])


def _scratch(plan: TimestepNormTpuPlan) -> dict[str, Any]:
    return {
        "centered": plan.transposed_tile,
        "g": plan.transposed_tile,
        "scale_lanes": plan.per_channel,
        "scale_sums": plan.per_channel,
        "bias_sums": plan.per_channel,
        "g_sums": plan.per_group,
        "product_sums": plan.per_group,
        "centered_means": plan.per_group,
        "constant": plan.per_group,
        "slope": plan.per_group,
        "carry": pltpu.VMEM((3, plan.group_rows, LANES), jnp.float32),
    }


def _kernel(plan: TimestepNormTpuPlan, refs: _Refs) -> None:
    step = pl.program_id(2)
    initialize_scratch(
        step,
        per_channel=[(refs.scale_lanes, refs.scale)],
        zeros=[
            refs.scale_sums,
            refs.bias_sums,
            refs.carry,
            refs.d_initial,
            # Rows of statistics without a group keep these zeros.
            refs.g_sums,
            refs.product_sums,
            refs.centered_means,
        ],
    )
    plan.for_lanes(lambda lanes: _sum_over_groups(plan, refs, lanes))
    _sum_over_tokens(plan, refs, plan.tiles - 1 - step)
    plan.for_lanes(lambda lanes: _write_gradients(plan, refs, lanes))

    @pl.when(step == plan.tiles - 1)
    def _write_row_sums() -> None:
        for block in plan.channel_blocks:
            for sums, out in ((refs.scale_sums, refs.d_scale), (refs.bias_sums, refs.d_bias)):
                out[:, block.channels] = sums[block.channels].T.sum(axis=0, keepdims=True)


def _sum_over_groups(plan: TimestepNormTpuPlan, refs: _Refs, lanes: Any) -> None:
    """Sums of g, g * centered and centered over the channels of every token's groups."""
    pivot_lanes = lanes if plan.is_packed else slice(None)
    for blocks in plan.whole_group_blocks:
        g_sums, product_sums, centered_sums = GroupSums(), GroupSums(), GroupSums()
        for block in blocks:
            for source, transposed in ((refs.x, refs.centered), (refs.dy, refs.g)):
                values = source[lanes, block.channels].astype(jnp.float32)
                transposed[block.channels, lanes] = values.T
            for group_slice in block.group_slices:
                group, channels, row = group_slice.group, group_slice.channels, group_slice.row
                pivot, offset = refs.pivot[row, pivot_lanes], refs.offset[row, lanes]
                centered = (refs.centered[channels, lanes] - pivot) - offset
                centered = plan.zero_channel_padding(centered, group_slice)
                centered = zero_padding(plan, refs.positions, lanes, centered)
                dy = zero_padding(plan, refs.positions, lanes, refs.g[channels, lanes])
                refs.scale_sums[channels] += dy * (centered * refs.rstd[row, lanes])
                refs.bias_sums[channels] += dy
                g = dy * refs.scale_lanes[channels]
                refs.centered[channels, lanes], refs.g[channels, lanes] = centered, g
                g_sums.add(group, g)
                product_sums.add(group, g * centered)
                centered_sums.add(group, centered)
        for group, total in g_sums.items():
            row = slice(group, group + 1)
            refs.g_sums[row, lanes], refs.product_sums[row, lanes] = total, product_sums[group]
            refs.centered_means[row, lanes] = centered_sums[group] / plan.features


def _sum_over_tokens(plan: TimestepNormTpuPlan, refs: _Refs, tile_index: Array) -> None:
    """The share of every token's gradient that comes from the moments of all later tokens."""
    tokens = plan.blocks.tokens
    tile = TilePositions.load(plan, refs.positions, tile_index)
    valid, start, later, final = (
        tile.has(flag) for flag in (VALID, DOCUMENT_START, LATER_DOCUMENT, FINAL_TOKEN)
    )
    carried = [repeat_lanes(refs.carry[i], tokens) for i in range(3)]
    d_final = [repeat_lanes(refs.d_final[i], tokens) for i in range(2)]
    rstd = refs.rstd[...]

    def sum_later(values: Array, i: int) -> Array:
        in_tile = tile.running_sums(jnp.where(valid, values, 0), reverse=True)
        return in_tile + jnp.where(tile.ends_after_tile, carried[i], 0)

    d_mean = -rstd * refs.g_sums[...] + jnp.where(final, d_final[0], 0)
    d_var = -0.5 * rstd * rstd * rstd * refs.product_sums[...] + jnp.where(final, d_final[1], 0)
    mean_sum = sum_later(d_mean / tile.count, _MEAN_SUM)
    var_sum = sum_later(d_var / tile.count, _VAR_SUM)
    # The step of the mean at this token; 0 where no token came before.
    before = tile.count - 1
    mean_step = jnp.where(before > 0, refs.centered_means[...] / jnp.maximum(before, 1), 0)
    drift_sum = sum_later(mean_step * var_sum, _DRIFT_SUM)
    drift_after = pltpu.roll(drift_sum, tokens - 1, 1)
    drift_after = jnp.where(tile.lane == tokens - 1, carried[_DRIFT_SUM], drift_after)
    is_document_end = (tile.to_end == 0) & ~tile.ends_after_tile
    drift_after = jnp.where(is_document_end, 0, drift_after)
    refs.constant[...] = (mean_sum - 2 * drift_after) / plan.features
    refs.slope[...] = 2 * var_sum / plan.features

    for i, values in enumerate((mean_sum, var_sum, drift_sum)):
        refs.carry[i] = broadcast_lane(values, 0)
    d_initial = (tile.initial_count * (mean_sum - 2 * drift_sum), tile.initial_count * var_sum)
    for i, values in enumerate(d_initial):
        at_start = jnp.where(start, values, 0)
        refs.d_initial[i] += plan.add_lanes(jnp.where(later, 0, at_start))
        if plan.is_packed:
            refs.d_initial[2 + i] += plan.add_lanes(jnp.where(later, at_start, 0))


def _write_gradients(plan: TimestepNormTpuPlan, refs: _Refs, lanes: Any) -> None:
    for block in plan.channel_blocks:
        pieces = []
        for group_slice in block.group_slices:
            channels, row = group_slice.channels, group_slice.row
            by_moments = refs.centered[channels, lanes] * refs.slope[row, lanes]
            by_moments += refs.constant[row, lanes]
            pieces.append(refs.g[channels, lanes] * refs.rstd[row, lanes] + by_moments)
        dx = jnp.concatenate(pieces, axis=0)
        # Positions beyond a row's end are not written back, so only padding in rows is zeroed.
        dx = zero_padding(plan, refs.positions, lanes, dx) if plan.is_packed else dx
        refs.dx[lanes, block.channels] = dx.T.astype(refs.dx.dtype)
