"""TimestepNorm on Hopper, forward: two of the four kernels, each of which reads a split once.

    timestep_norm_moments    count, mean and squares of every split
    timestep_norm_outputs    y, and for every token pivot k, offset a = m - k, r = (v + eps)^(-1/2)
    timestep_norm_slopes     backward.py: what a split's gradients add to those of earlier tokens
    timestep_norm_gradients  backward.py: dx, and sums for the gradients of all else

A tile takes three steps: sums over the features of each token, running sums over its tokens, and
results. In between the numbers of a token go from four threads to one and back (layout.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.timestep_norm.mosaic_gpu.layout import (
    HALF_TILE,
    HALVES,
    LANE_LAYOUT,
    ROW_LAYOUT,
    Array,
    broadcast_columns,
    broadcast_groups,
    broadcast_scalar,
    lane_index,
    load_columns,
    load_half,
    load_lanes,
    load_rows,
    sum_groups,
    synchronize,
    zeros,
)
from pallas_kernels.timestep_norm.mosaic_gpu.operands import (
    InputTiles,
    KernelScratch,
    TokenInfo,
    has,
    input_slices,
    load_token_info,
)
from pallas_kernels.timestep_norm.mosaic_gpu.pipeline import WorkItem, find_work_item, stream
from pallas_kernels.timestep_norm.mosaic_gpu.running_sums import clear_margins, running_sums
from pallas_kernels.timestep_norm.row_splits.types import (
    DOCUMENT_START,
    FEEDS_NEXT_SPLIT,
    FLAGS,
    LATER_DOCUMENT,
    TILE,
    VALID,
    KernelInputs,
    Outputs,
    TimestepNormDocuments,
    TimestepNormGeometry,
)


class _TokenMoments(NamedTuple):
    """Moments of a token's own numbers; the float32 mean is rounded, `mean_error` is the rest."""

    mean: Array
    mean_error: Array
    var: Array


def _find_token_moments(values: Array, geometry: TimestepNormGeometry) -> list[_TokenMoments]:
    """Moments of 64 tokens, for every group."""
    each, width = 1 / geometry.features, geometry.width

    def average(values):
        return [total * each for total in sum_groups(values, width)]

    means = average(values)
    deviation = values - broadcast_groups(means, width)
    if geometry.features < width:
        column = plgpu.broadcasted_iota(jnp.int32, values.shape, 1, layout=plgpu.Layout.WGMMA)
        is_feature = jax.lax.rem(column, width) < geometry.features
        deviation = jnp.where(is_feature, deviation, jnp.zeros_like(deviation))
    errors, squares = average(deviation), average(deviation * deviation)
    return [
        _TokenMoments(mean, error, jnp.maximum(square - error * error, 0.0))
        for mean, error, square in zip(means, errors, squares, strict=True)
    ]


class _StridedMoments(NamedTuple):
    """Moments of every 128th token: pivot, offset of the mean from it, squares around the mean."""

    pivot: Array
    offset: Array
    squares: Array


def _add_token(
    moments: _StridedMoments, count: Array, token: _TokenMoments, is_counted: Array | None
) -> _StridedMoments:
    after = count + 1.0
    pivot = jnp.where(count > 0.0, moments.pivot, token.mean)
    delta = ((token.mean - pivot) + token.mean_error) - moments.offset
    new = _StridedMoments(
        pivot,
        moments.offset + delta / after,
        moments.squares + token.var + delta * delta * (count / after),
    )
    if is_counted is None:
        return new
    return _StridedMoments(
        *(jnp.where(is_counted, a, b) for a, b in zip(new, moments, strict=True))
    )


def moments_kernel(
    inputs: KernelInputs, results: Any, scratch: KernelScratch, *, geometry: TimestepNormGeometry
) -> None:
    """Writes (B, J, G, 4): count, pivot, offset of the mean and squares of the first J splits.

    In packed rows they count only the tokens of the document that the split ends in.
    """
    work = find_work_item(geometry)
    zero = zeros((HALF_TILE,), ROW_LAYOUT)
    start = [[_StridedMoments(zero, zero, zero)] * HALVES] * geometry.groups_per_block

    def run_tile(tile, tiles_smem, output_smem, carry):
        counts, moments = carry
        new_counts, new_moments = [], [[] for _ in moments]
        for half in range(HALVES):
            is_counted = None
            if inputs.documents is not None:
                flags = load_rows(tiles_smem.token_info.at[0, FLAGS], half)
                is_counted = has(flags, VALID) & has(flags, FEEDS_NEXT_SPLIT)
            found = _find_token_moments(load_half(tiles_smem.x, half), geometry)
            for i, token in enumerate(found):
                new_moments[i].append(_add_token(moments[i][half], counts[half], token, is_counted))
            after = counts[half] + 1.0
            if is_counted is not None:
                after = jnp.where(is_counted, after, counts[half])
            new_counts.append(after)
        return new_counts, new_moments

    # In reverse, so that the first tiles of the next kernel are still in the L2 cache.
    counts, moments = stream(
        work,
        scratch.stage,
        lambda tile: input_slices(inputs, work, tile),
        None,
        ([zero] * HALVES, start),
        run_tile,
        reverse=True,
    )
    for i in range(geometry.groups_per_block):
        for half in range(HALVES):
            for j, value in enumerate((counts[half], *moments[i][half])):
                scratch.feature_sums[i, j, pl.ds(half * HALF_TILE, HALF_TILE)] = value
    synchronize()
    for i, group in enumerate(work.groups):
        values = _merge_strided_moments(
            [load_lanes(scratch.feature_sums.at[i, j]) for j in range(4)]
        )
        for j, value in enumerate(values):
            results[work.row, work.split, group, j] = value


def _merge_strided_moments(moments: list[Array]) -> tuple[Any, Any, Any, Any]:
    """Count, pivot, offset of the mean and squares of 128 lanes together."""
    count, pivot, offset, squares = moments
    total = count.sum()
    each = 1.0 / jnp.maximum(total, 1.0)
    common_pivot = (count * (pivot + offset)).sum() * each
    deviation = (pivot - broadcast_scalar(common_pivot)) + offset
    mean = (count * deviation).sum() * each
    deviation = deviation - broadcast_scalar(mean)
    squares = (squares + count * (deviation * deviation)).sum()
    return total, common_pivot, mean, squares


class _State(NamedTuple):
    """State of a group between tiles: pivot, sum around it, squares; scalars."""

    pivot: Any
    total: Any
    squares: Any


def _document_initial_states(
    documents: TimestepNormDocuments,
    work: WorkItem,
    tile: Any,
    tokens: TokenInfo,
    means: list[Array],
    sums_smem: Any,
) -> list[tuple[Array, Array]]:
    """Pivot and squares that the documents that start in this tile start from, for every group."""
    later = has(tokens.flags, LATER_DOCUMENT)
    has_initial = [
        broadcast_scalar(documents.has_initial[work.row, j].astype(jnp.float32)) > 0.5
        for j in range(2)
    ]
    zero = zeros((TILE,), LANE_LAYOUT)

    def find_first_means():
        is_start = has(tokens.flags, DOCUMENT_START)
        at_start = [jnp.where(is_start, mean, zero) for mean in means]
        return running_sums(sums_smem, at_start, tokens.from_start, reverse=False)

    has_start = documents.has_start[work.row, tile] != 0
    first_means = jax.lax.cond(has_start, find_first_means, lambda: [zero for _ in means])
    found = []
    for group, first_mean in zip(work.groups, first_means, strict=True):
        state_mean, state_squares, prior_mean, prior_squares = (
            broadcast_scalar(documents.initial[work.row, group, j]) for j in range(4)
        )
        pivot = jnp.where(
            later,
            jnp.where(has_initial[1], prior_mean, first_mean),
            jnp.where(has_initial[0], state_mean, first_mean),
        )
        found.append((pivot, jnp.where(later, prior_squares, state_squares)))
    return found


class _RunningMoments(NamedTuple):
    """Moments after every token of a tile: k, a, r, and the sums of the next tile's state."""

    pivot: Array
    offset: Array
    rstd: Array
    total: Array
    squares: Array


def _find_running_moments(
    inputs: KernelInputs,
    work: WorkItem,
    tile: Any,
    tokens: TokenInfo,
    scratch: KernelScratch,
    states: list[_State],
    eps: float,
) -> list[_RunningMoments]:
    """The running moments of every group, from `scratch.feature_sums`."""
    means, errors, variances = (
        [load_lanes(scratch.feature_sums.at[i, j]) for i in range(len(states))] for j in range(3)
    )
    each = 1.0 / tokens.count
    before = tokens.count - 1.0
    each_before, share = 1.0 / jnp.maximum(before, 1.0), before * each
    initial = [_State(*(broadcast_scalar(value) for value in state)) for state in states]
    valid, zero = None, jnp.zeros_like(means[0])
    if inputs.documents is not None:
        starts_before_tile = tokens.from_start > lane_index()
        valid = has(tokens.flags, VALID)
        started = _document_initial_states(
            inputs.documents, work, tile, tokens, means, scratch.sums
        )
        initial = [
            _State(
                jnp.where(starts_before_tile, carried.pivot, pivot),
                jnp.where(starts_before_tile, carried.total, zero),
                jnp.where(starts_before_tile, carried.squares, squares),
            )
            for carried, (pivot, squares) in zip(initial, started, strict=True)
        ]

    def sum_valid(values):
        if valid is not None:
            values = [jnp.where(valid, value, zero) for value in values]
        return values, running_sums(scratch.sums, values, tokens.from_start, reverse=False)

    differences, sums = sum_valid(
        [
            (mean - state.pivot) + error
            for mean, error, state in zip(means, errors, initial, strict=True)
        ]
    )
    totals = [state.total + added for state, added in zip(initial, sums, strict=True)]
    summands = []
    for difference, total, var in zip(differences, totals, variances, strict=True):
        deviation = difference - (total - difference) * each_before
        summands.append(var + deviation * deviation * share)
    _, sums = sum_valid(summands)
    found = []
    for state, total, added in zip(initial, totals, sums, strict=True):
        squares = state.squares + added
        rstd = jax.lax.rsqrt(squares * each + eps)
        found.append(_RunningMoments(state.pivot, total * each, rstd, total, squares))
    return found


class _OutputsWarpgroup(NamedTuple):
    """A warpgroup of `timestep_norm_outputs`."""

    inputs: KernelInputs
    results: Outputs
    scratch: KernelScratch
    geometry: TimestepNormGeometry
    eps: float
    work: WorkItem
    scale: Array
    bias: Array

    @property
    def is_packed(self) -> bool:
        return self.inputs.documents is not None

    def run_tile(
        self, tile, tiles_smem: InputTiles, output_smem, states: list[_State]
    ) -> list[_State]:
        scratch, groups = self.scratch, range(self.geometry.groups_per_block)
        for half in range(HALVES):
            rows = pl.ds(half * HALF_TILE, HALF_TILE)
            moments = _find_token_moments(load_half(tiles_smem.x, half), self.geometry)
            for i, values in enumerate(moments):
                for j, value in enumerate(values):
                    scratch.feature_sums[i, j, rows] = value
        tokens = load_token_info(self.inputs, self.work, tile, tiles_smem)
        synchronize()
        if not self.is_packed:
            states = [self.choose_pivot(states[i], i, tile) for i in groups]
        found = _find_running_moments(
            self.inputs, self.work, tile, tokens, scratch, states, self.eps
        )
        for i in groups:
            self.store_moments(i, tile, tokens, found[i])
        synchronize()
        for half in range(HALVES):
            y = self.normalize(load_half(tiles_smem.x, half), half)
            output_smem[0, pl.ds(half * HALF_TILE, HALF_TILE)] = y.astype(output_smem.dtype)
        last = TILE - 1
        return [
            _State(
                scratch.token_results[i, 0, last],
                scratch.feature_sums[i, 0, last],
                scratch.feature_sums[i, 1, last],
            )
            for i in groups
        ]

    def choose_pivot(self, state: _State, i: int, tile: Any) -> _State:
        """The pivot is the mean of the row's first token if the row starts from a count of 0."""
        work = self.work
        is_first = (self.inputs.initial_count[work.row] == 0) & (tile == 0)
        pivot = jnp.where(is_first, self.scratch.feature_sums[i, 0, 0], state.pivot)
        if self.results.pivots is not None:
            self.results.pivots[work.row, work.split, work.groups[i]] = pivot
        return state._replace(pivot=pivot)

    def store_moments(self, i: int, tile: Any, tokens: TokenInfo, found: _RunningMoments) -> None:
        results, all_tokens = self.results, pl.ds(0, TILE)
        row, group = self.work.row, self.work.groups[i]
        for j, value in enumerate((found.pivot, found.offset, found.rstd)):
            self.scratch.token_results[i, j, all_tokens] = value
        # The last token's sums are read back as scalars.
        self.scratch.feature_sums[i, 0, all_tokens] = found.total
        self.scratch.feature_sums[i, 1, all_tokens] = found.squares
        if self.is_packed:
            one = jnp.ones_like(found.rstd)
            valid = jnp.where(has(tokens.flags, VALID), one, jnp.zeros_like(one))
            self.scratch.token_results[i, 3, all_tokens] = valid
        if results.statistics is not None:
            saved = (found.offset, found.rstd, found.pivot)[: 3 if self.is_packed else 2]
            for j, value in enumerate(saved):
                results.statistics[row, group, tile, j, all_tokens] = value

        @pl.when(tile == self.geometry.tiles - 1)
        def _store_final_moments():
            results.final_moments[row, group, 0, all_tokens] = found.pivot + found.offset
            results.final_moments[row, group, 1, all_tokens] = found.squares / tokens.count

    def normalize(self, x: Array, half: int) -> Array:
        groups = range(self.geometry.groups_per_block)
        pivot, offset, rstd, *valid = (
            broadcast_groups(
                [load_rows(self.scratch.token_results.at[i, j], half) for i in groups],
                self.geometry.width,
            )
            for j in range(4 if self.is_packed else 3)
        )
        y = ((x - pivot) - offset) * rstd * broadcast_columns(self.scale)
        y = y + broadcast_columns(self.bias)
        return jnp.where(valid[0] > 0.5, y, jnp.zeros_like(y)) if valid else y


def outputs_kernel(
    inputs: KernelInputs,
    results: Outputs,
    scratch: KernelScratch,
    *,
    geometry: TimestepNormGeometry,
    eps: float,
) -> None:
    """Writes y and what the backward pass needs."""
    work = find_work_item(geometry)
    clear_margins(scratch.sums)
    scale, bias = (load_columns(a, work.columns) for a in (inputs.scale, inputs.bias))
    warpgroup = _OutputsWarpgroup(inputs, results, scratch, geometry, eps, work, scale, bias)
    states = [
        _State(*(inputs.previous_states[work.row, work.split, group, j] for j in range(3)))
        for group in work.groups
    ]
    stream(
        work,
        scratch.stage,
        lambda tile: input_slices(inputs, work, tile),
        lambda tile: work.sequence_slice(results.y, tile),
        states,
        warpgroup.run_tile,
        reverse=False,
    )
