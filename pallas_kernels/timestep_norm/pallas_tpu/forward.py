"""The forward kernel of TimestepNorm on TPU. README.md derives what it computes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import LANES
from pallas_kernels.timestep_norm.pallas_tpu.layout import (
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


class Statistics(NamedTuple):
    """Moments after every token of every group: mean = pivot + offset, and 1 / sqrt(var + eps).

    Without documents a row has one pivot, in all of 128 lanes.
    """

    pivot: Float[Array, "B S R #L"]
    offset: Float[Array, "B S R L"]
    rstd: Float[Array, "B S R L"]


class ForwardResult(NamedTuple):
    """Results of `normalize`.

    Attributes:
      y: normalized input.
      last: mean and var after the row's last token in the last lane.
      statistics: for the backward pass, if asked for.
    """

    y: Float[Array, "B L D"]
    last: Float[Array, "B S 2 R 128"]
    statistics: Statistics | None


class _Refs(NamedTuple):
    x: Any
    places: Any
    before: Any
    scale: Any
    bias: Any
    y: Any
    last: Any
    turned: Any
    turned_scale: Any
    turned_bias: Any
    mean: Any
    rest: Any
    var: Any
    carry: Any
    pivot: Any
    offset: Any
    rstd: Any


# Rows of `before`, and of `carry`.
STATE_MEAN, STATE_VAR, PRIOR_MEAN, PRIOR_VAR = range(4)
_PIVOT, _TOTAL, _SQUARES, _OFFSET = range(4)


def normalize(
    plan: Plan,
    x: Float[Array, "B L D"],
    scale: Float[Array, "1 D"],
    bias: Float[Array, "1 D"],
    before: Float[Array, "B S 4 R 128"],
    places: Int32[Array, "B 8 L"],
    *,
    save_statistics: bool,
) -> ForwardResult:
    """Runs the forward kernel.

    Args:
      plan: static sizes.
      x: D padded to whole grid steps.
      scale: of x's channels.
      bias: of x's channels.
      before: mean and var of a row's state and of the prior.
      places: of `find_places`.
      save_statistics: whether a backward pass follows.
    """
    frame = Frame(plan, x.shape[0], backward=False)
    shape = (x.shape[0], plan.steps, plan.rows, plan.padded_length)
    last = jax.ShapeDtypeStruct((*shape[:2], 2, plan.rows, LANES), jnp.float32)
    outputs = {"y": frame.sequence(jax.ShapeDtypeStruct(x.shape, x.dtype))}
    outputs["last"] = frame.moments(last)
    per_token = jax.ShapeDtypeStruct(shape, jnp.float32)
    scratch = _scratch(plan)
    if save_statistics:
        outputs["pivot"] = frame.pivots(shape)
        outputs["offset"] = outputs["rstd"] = frame.statistics(per_token)
    else:
        scratch["pivot"] = scratch["offset"] = scratch["rstd"] = scratch["mean"]
    results = frame.call(
        lambda refs: _kernel(plan, refs),
        _Refs,
        inputs={
            "x": frame.sequence(x),
            "places": frame.places(places),
            "before": frame.moments(before),
            "scale": frame.channels(scale),
            "bias": frame.channels(bias),
        },
        outputs=outputs,
        scratch=scratch,
        name="timestep_norm_forward",
    )
    statistics = None
    if save_statistics:
        statistics = Statistics(results["pivot"], results["offset"], results["rstd"])
    return ForwardResult(results["y"], results["last"], statistics)


def _scratch(plan: Plan) -> dict[str, Any]:
    channels, tokens = plan.blocks.channels, plan.blocks.tokens
    per_channel = pltpu.VMEM((channels, LANES), jnp.float32)
    per_group = pltpu.VMEM((plan.rows, tokens), jnp.float32)
    return {
        "turned": pltpu.VMEM((channels, tokens), jnp.float32),
        "turned_scale": per_channel,
        "turned_bias": per_channel,
        "mean": per_group,
        "rest": per_group,
        "var": per_group,
        "carry": pltpu.VMEM((4, plan.rows, LANES), jnp.float32),
    }


def _kernel(plan: Plan, refs: _Refs) -> None:
    number = pl.program_id(2)

    @pl.when(number == 0)
    def _start() -> None:
        refs.turned_scale[...] = turn_row(refs.scale[...])
        refs.turned_bias[...] = turn_row(refs.bias[...])
        refs.carry[...] = jnp.zeros_like(refs.carry)
        # Rows without a group stay as they are.
        for ref in (refs.mean, refs.rest, refs.var):
            ref[...] = jnp.zeros_like(ref)

    plan.for_lanes(lambda lanes: _find_own_moments(plan, refs, lanes))
    _find_running_moments(plan, refs, number)
    plan.for_lanes(lambda lanes: _write_outputs(plan, refs, lanes))


def _find_own_moments(plan: Plan, refs: _Refs, lanes: Any) -> None:
    """Mean and variance of every token's own numbers."""
    for bands in plan.closed_bands:
        sums = GroupSums()
        for band in bands:
            turned = refs.x[lanes, band.channels].astype(jnp.float32).T
            refs.turned[band.channels, lanes] = turned
            for part in band.parts:
                sums.add(part.group, refs.turned[part.channels, lanes])
        means = {group: total / plan.features for group, total in sums.items()}
        # A float32 mean of numbers far from 0 is rounded; `rest` is what the rounding lost.
        rests, squares = GroupSums(), GroupSums()
        for part in (part for band in bands for part in band.parts):
            deviation = refs.turned[part.channels, lanes] - means[part.group]
            deviation = plan.without_padding(deviation, part)
            rests.add(part.group, deviation)
            squares.add(part.group, jnp.square(deviation))
        for group, mean in means.items():
            row, rest = slice(group, group + 1), rests[group] / plan.features
            refs.mean[row, lanes], refs.rest[row, lanes] = mean, rest
            var = squares[group] / plan.features - jnp.square(rest)
            refs.var[row, lanes] = jnp.maximum(var, 0)


def _find_running_moments(plan: Plan, refs: _Refs, number: Array) -> None:
    """Moments after every token, from its own and those before it."""
    tokens = plan.blocks.tokens
    tile = Tile.read(plan, refs.places, number)
    valid, start, later = (tile.has(flag) for flag in (VALID, START, LATER))
    before = [repeat_lanes(refs.before[i], tokens) for i in range(4)]
    carried = [repeat_lanes(refs.carry[i], tokens) for i in range(4)]
    mean = refs.mean[...]
    if plan.packed:
        first = tile.running_sums(jnp.where(start, mean, 0))
        initial_mean = jnp.where(later, before[PRIOR_MEAN], before[STATE_MEAN])
        initial_var = jnp.where(later, before[PRIOR_VAR], before[STATE_VAR])
    else:
        first = repeat_lanes(fill_lanes(mean, 0), tokens)
        initial_mean, initial_var = before[STATE_MEAN], before[STATE_VAR]
    pivot = jnp.where(tile.initial_count > 0, initial_mean, first)
    pivot = jnp.where(tile.came_before, carried[_PIVOT], pivot)

    difference = jnp.where(valid, (mean - pivot) + refs.rest[...], 0)
    total = tile.running_sums(difference)
    total += jnp.where(tile.came_before, carried[_TOTAL], 0)
    offset = total / tile.count
    previous = jnp.where(tile.lane == 0, carried[_OFFSET], pltpu.roll(offset, 1, 1))
    previous = jnp.where(start, 0, previous)
    share = (tile.count - 1) / tile.count
    spread = refs.var[...] + jnp.square(difference - previous) * share
    squares = tile.running_sums(jnp.where(valid, spread, 0))
    squares += jnp.where(tile.came_before, carried[_SQUARES], 0)
    var = (tile.initial_count * initial_var + squares) / tile.count

    for i, values in enumerate((pivot, total, squares, offset)):
        refs.carry[i] = fill_lanes(values, tokens - 1)
    refs.last[0] = fill_lanes(pivot + offset, tokens - 1)
    refs.last[1] = fill_lanes(var, tokens - 1)
    refs.pivot[...] = pivot[:, : refs.pivot.shape[1]]
    refs.offset[...] = offset
    refs.rstd[...] = lax.rsqrt(var + plan.eps)


def _write_outputs(plan: Plan, refs: _Refs, lanes: Any) -> None:
    one_pivot = lanes if plan.packed else slice(None, LANES)
    for band in plan.bands:
        normalized = []
        for part in band.parts:
            pivot, offset = refs.pivot[part.row, one_pivot], refs.offset[part.row, lanes]
            centered = (refs.turned[part.channels, lanes] - pivot) - offset
            normalized.append(centered * refs.rstd[part.row, lanes])
        y = jnp.concatenate(normalized, axis=0)
        y = y * refs.turned_scale[band.channels] + refs.turned_bias[band.channels]
        # What lies beyond a row's end is not written.
        y = plan.where_valid(refs.places, lanes, y) if plan.packed else y
        refs.y[lanes, band.channels] = y.T.astype(refs.y.dtype)
