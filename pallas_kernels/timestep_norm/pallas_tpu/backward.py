"""The backward kernel of TimestepNorm on TPU. README.md derives what it computes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import LANES
from pallas_kernels.timestep_norm.pallas_tpu.forward import Statistics
from pallas_kernels.timestep_norm.pallas_tpu.layout import (
    FINAL,
    LATER,
    START,
    VALID,
    Frame,
    GroupSums,
    Plan,
    Tile,
    fill_lanes,
    repeat_lanes,
    turn_row,
)


class Gradients(NamedTuple):
    """Results of `differentiate`.

    Attributes:
      x: gradient of x.
      scale: of scale, by row.
      bias: of bias, by row.
      before: of the mean and var of a row's state and of the prior, to be summed over lanes.
    """

    x: Float[Array, "B L D"]
    scale: Float[Array, "B 1 D"]
    bias: Float[Array, "B 1 D"]
    before: Float[Array, "B S 4 R 128"]


class _Refs(NamedTuple):
    x: Any
    dy: Any
    places: Any
    d_last: Any
    scale: Any
    pivot: Any
    offset: Any
    rstd: Any
    dx: Any
    d_scale: Any
    d_bias: Any
    d_before: Any
    centered: Any
    g: Any
    turned_scale: Any
    scale_sums: Any
    bias_sums: Any
    g_sums: Any
    product_sums: Any
    centered_means: Any
    shift: Any
    slope: Any
    carry: Any


# Rows of `carry`.
_MEAN_SUM, _VAR_SUM, _DRIFT_SUM = range(3)


def differentiate(
    plan: Plan,
    x: Float[Array, "B L D"],
    dy: Float[Array, "B L D"],
    d_last: Float[Array, "B S 2 R 128"],
    scale: Float[Array, "1 D"],
    statistics: Statistics,
    places: Int32[Array, "B 8 L"],
) -> Gradients:
    """Runs the backward kernel.

    Args:
      plan: static sizes.
      x: as it went in.
      dy: cotangent of y.
      d_last: cotangents of the mean and var after the row's last token.
      scale: as it went in.
      statistics: of the forward kernel.
      places: of `find_places`.
    """
    batch = x.shape[0]
    frame = Frame(plan, batch, backward=True)
    per_row = jax.ShapeDtypeStruct((batch, 1, x.shape[2]), jnp.float32)
    before = jax.ShapeDtypeStruct((batch, plan.steps, 4, plan.rows, LANES), jnp.float32)
    results = frame.call(
        lambda refs: _kernel(plan, refs),
        _Refs,
        inputs={
            "x": frame.sequence(x),
            "dy": frame.sequence(dy),
            "places": frame.places(places),
            "d_last": frame.moments(d_last),
            "scale": frame.channels(scale),
            "pivot": (statistics.pivot, frame.pivots(statistics.offset.shape)[1]),
            "offset": frame.statistics(statistics.offset),
            "rstd": frame.statistics(statistics.rstd),
        },
        outputs={
            "dx": frame.sequence(jax.ShapeDtypeStruct(x.shape, x.dtype)),
            "d_scale": frame.row_channels(per_row),
            "d_bias": frame.row_channels(per_row),
            "d_before": frame.moments(before),
        },
        scratch=_scratch(plan),
        name="timestep_norm_backward",
    )
    return Gradients(*results.values())


def _scratch(plan: Plan) -> dict[str, Any]:
    channels, tokens = plan.blocks.channels, plan.blocks.tokens
    turned = pltpu.VMEM((channels, tokens), jnp.float32)
    per_channel = pltpu.VMEM((channels, LANES), jnp.float32)
    per_group = pltpu.VMEM((plan.rows, tokens), jnp.float32)
    return {
        "centered": turned,
        "g": turned,
        "turned_scale": per_channel,
        "scale_sums": per_channel,
        "bias_sums": per_channel,
        "g_sums": per_group,
        "product_sums": per_group,
        "centered_means": per_group,
        "shift": per_group,
        "slope": per_group,
        "carry": pltpu.VMEM((3, plan.rows, LANES), jnp.float32),
    }


def _kernel(plan: Plan, refs: _Refs) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        refs.turned_scale[...] = turn_row(refs.scale[...])
        for ref in (
            refs.scale_sums, refs.bias_sums, refs.carry, refs.d_before,
            refs.g_sums, refs.product_sums, refs.centered_means,
        ):  # fmt: skip
            ref[...] = jnp.zeros_like(ref)

    plan.for_lanes(lambda lanes: _sum_over_groups(plan, refs, lanes))
    _sum_over_tokens(plan, refs, plan.tiles - 1 - step)
    plan.for_lanes(lambda lanes: _write_gradients(plan, refs, lanes))

    @pl.when(step == plan.tiles - 1)
    def _end() -> None:
        for band in plan.bands:
            for sums, out in ((refs.scale_sums, refs.d_scale), (refs.bias_sums, refs.d_bias)):
                out[:, band.channels] = sums[band.channels].T.sum(axis=0, keepdims=True)


def _sum_over_groups(plan: Plan, refs: _Refs, lanes: Any) -> None:
    pivot_lanes = lanes if plan.packed else slice(None)
    for bands in plan.closed_bands:
        g_sums, product_sums, centered_sums = GroupSums(), GroupSums(), GroupSums()
        for band in bands:
            refs.centered[band.channels, lanes] = refs.x[lanes, band.channels].astype(jnp.float32).T
            refs.g[band.channels, lanes] = refs.dy[lanes, band.channels].astype(jnp.float32).T
            for part in band.parts:
                channels, row = part.channels, part.row
                pivot, offset = refs.pivot[row, pivot_lanes], refs.offset[row, lanes]
                centered = (refs.centered[channels, lanes] - pivot) - offset
                centered = plan.without_padding(centered, part)
                centered = plan.where_valid(refs.places, lanes, centered)
                dy = plan.where_valid(refs.places, lanes, refs.g[channels, lanes])
                refs.scale_sums[channels] += dy * (centered * refs.rstd[row, lanes])
                refs.bias_sums[channels] += dy
                g = dy * refs.turned_scale[channels]
                refs.centered[channels, lanes], refs.g[channels, lanes] = centered, g
                g_sums.add(part.group, g)
                product_sums.add(part.group, g * centered)
                centered_sums.add(part.group, centered)
        for group, total in g_sums.items():
            row = slice(group, group + 1)
            refs.g_sums[row, lanes], refs.product_sums[row, lanes] = total, product_sums[group]
            refs.centered_means[row, lanes] = centered_sums[group] / plan.features


def _sum_over_tokens(plan: Plan, refs: _Refs, number: Array) -> None:
    """How much of a token's gradient comes from the moments of all later ones."""
    tokens = plan.blocks.tokens
    tile = Tile.read(plan, refs.places, number)
    valid, start, later, final = (tile.has(flag) for flag in (VALID, START, LATER, FINAL))
    carried = [repeat_lanes(refs.carry[i], tokens) for i in range(3)]
    d_last = [repeat_lanes(refs.d_last[i], tokens) for i in range(2)]
    rstd = refs.rstd[...]

    def sum_later(values: Array, i: int) -> Array:
        within = tile.running_sums(jnp.where(valid, values, 0), reverse=True)
        return within + jnp.where(tile.goes_on, carried[i], 0)

    d_mean = -rstd * refs.g_sums[...] + jnp.where(final, d_last[0], 0)
    d_var = -0.5 * rstd * rstd * rstd * refs.product_sums[...] + jnp.where(final, d_last[1], 0)
    mean_sum = sum_later(d_mean / tile.count, _MEAN_SUM)
    var_sum = sum_later(d_var / tile.count, _VAR_SUM)
    # How far this token moved the mean: none moved it from nothing.
    before = tile.count - 1
    moved = jnp.where(before > 0, refs.centered_means[...] / jnp.maximum(before, 1), 0)
    drift_sum = sum_later(moved * var_sum, _DRIFT_SUM)
    drift_after = pltpu.roll(drift_sum, tokens - 1, 1)
    drift_after = jnp.where(tile.lane == tokens - 1, carried[_DRIFT_SUM], drift_after)
    ends = (tile.to_end == 0) & ~tile.goes_on
    drift_after = jnp.where(ends, 0, drift_after)
    refs.shift[...] = (mean_sum - 2 * drift_after) / plan.features
    refs.slope[...] = 2 * var_sum / plan.features

    for i, values in enumerate((mean_sum, var_sum, drift_sum)):
        refs.carry[i] = fill_lanes(values, 0)
    d_initial = (tile.initial_count * (mean_sum - 2 * drift_sum), tile.initial_count * var_sum)
    for i, values in enumerate(d_initial):
        at_start = jnp.where(start, values, 0)
        refs.d_before[i] += plan.add_lanes(jnp.where(later, 0, at_start))
        if plan.packed:
            refs.d_before[2 + i] += plan.add_lanes(jnp.where(later, at_start, 0))


def _write_gradients(plan: Plan, refs: _Refs, lanes: Any) -> None:
    for band in plan.bands:
        parts = []
        for part in band.parts:
            channels, row = part.channels, part.row
            by_moments = refs.centered[channels, lanes] * refs.slope[row, lanes]
            by_moments += refs.shift[row, lanes]
            parts.append(refs.g[channels, lanes] * refs.rstd[row, lanes] + by_moments)
        dx = jnp.concatenate(parts, axis=0)
        # What lies beyond a row's end is not written.
        dx = plan.where_valid(refs.places, lanes, dx) if plan.packed else dx
        refs.dx[lanes, band.channels] = dx.T.astype(refs.dx.dtype)
