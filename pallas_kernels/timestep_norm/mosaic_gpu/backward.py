"""TimestepNorm on Hopper, backward: two of the four kernels that forward.py lists.

With s_t = dv_t / n_t and u_t = dm_t / n_t as in README.md, and q_t = u_t - 2 a_t s_t, dx needs two
running sums over the tokens from i on, here called slopes:

    S_i = Σ_{t≥i} s_t        T_i = Σ_{t≥i} q_t        dx_i = g_i r_i + (T_i + 2 (x_i - k) S_i) / F

They are README's sums around the pivot k. Around another pivot k', T changes by 2 (k' - k) S.
"""

from typing import Any, NamedTuple

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
    COUNT,
    DOCUMENT_START,
    FEEDS_PREVIOUS_SPLIT,
    FLAGS,
    LATER_DOCUMENT,
    TILE,
    VALID,
    Gradients,
    KernelInputs,
    TimestepNormGeometry,
)

# Rows of `KernelInputs.statistics`.
_OFFSET, _RSTD, _PIVOT = range(3)
# Rows of `KernelScratch.token_results`: S, T, 2 S / F and T / F.
_S, _T, _SLOPE, _CONSTANT = range(4)


class _HalfTile(NamedTuple):
    """64 tokens with all their features.

    Attributes:
      from_pivot: x - k.
      centered: x - m.
      dy: cotangent of y, 0 at padding.
      rstd: r.
      valid: False at padding; None without padding.
    """

    from_pivot: Array
    centered: Array
    dy: Array
    rstd: Array
    valid: Array | None


def _load_half_tile(
    inputs: KernelInputs,
    work: WorkItem,
    geometry: TimestepNormGeometry,
    tiles_smem: InputTiles,
    half: int,
) -> _HalfTile:
    groups, width = range(geometry.groups_per_block), geometry.width

    def statistic(j):
        return broadcast_groups(
            [load_rows(tiles_smem.statistics.at[i, j], half) for i in groups], width
        )

    x, dy = load_half(tiles_smem.x, half), load_half(tiles_smem.dy, half)
    if inputs.documents is None:
        scalars = (inputs.pivots[work.row, work.split, group] for group in work.groups)
        pivot = broadcast_groups(
            [broadcast_scalar(k, (HALF_TILE,), ROW_LAYOUT) for k in scalars], width
        )
    else:
        pivot = statistic(_PIVOT)
    from_pivot = x - pivot
    centered = from_pivot - statistic(_OFFSET)
    if inputs.documents is None:
        return _HalfTile(from_pivot, centered, dy, statistic(_RSTD), None)
    flags = broadcast_groups(
        [load_rows(tiles_smem.token_info.at[0, FLAGS], half)], geometry.block_width
    )
    valid = has(flags, VALID)
    zero = jnp.zeros_like(x)
    dy, centered = jnp.where(valid, dy, zero), jnp.where(valid, centered, zero)
    return _HalfTile(from_pivot, centered, dy, statistic(_RSTD), valid)


def _sum_over_features(tile: _HalfTile, scale: Array, width: int) -> list[tuple[Array, Array]]:
    """Σ g and Σ g (x - m) over a token's features, for every group."""
    g = tile.dy * broadcast_columns(scale)
    sums = sum_groups(g, width), sum_groups(g * tile.centered, width)
    return list(zip(*sums, strict=True))


def _token_slopes(
    sums: tuple[Array, Array], count: Array, offset: Array, rstd: Array
) -> tuple[Array, Array]:
    """s and q of every token, from the sums over its features."""
    each = rstd / count
    s = -0.5 * (rstd * rstd) * (sums[1] * each)
    return s, -(each * sums[0]) - 2.0 * (offset * s)


def _load_counts(
    inputs: KernelInputs, work: WorkItem, tile: Any, tiles_smem: InputTiles, half: int
) -> tuple[Array, Array | None]:
    """Counts of 64 tokens, and which of them `slopes_kernel` counts; None for all."""
    if inputs.documents is None:
        index = plgpu.broadcasted_iota(jnp.int32, (HALF_TILE,), 0, layout=ROW_LAYOUT)
        first = inputs.initial_count[work.row] + tile * TILE + half * HALF_TILE + 1
        return (index + first).astype(jnp.float32), None
    count, flags = (load_rows(tiles_smem.token_info.at[0, j], half) for j in (COUNT, FLAGS))
    count = jnp.maximum(count.astype(jnp.float32), 1.0)
    return count, has(flags, VALID) & has(flags, FEEDS_PREVIOUS_SPLIT)


def slopes_kernel(
    inputs: KernelInputs,
    results: Any,
    scratch: KernelScratch,
    *,
    geometry: TimestepNormGeometry,
    first_split: int,
) -> None:
    """Writes (B, J, G, 2): S and T over the tokens of every split from `first_split` on.

    In packed rows they count only the tokens whose document started before the split or is the
    row's first.
    """
    work = find_work_item(geometry, first_split)
    scale = load_columns(inputs.scale, work.columns)
    zero = zeros((HALF_TILE,), ROW_LAYOUT)

    def run_tile(tile, tiles_smem, output_smem, carry):
        new = [[] for _ in carry]
        for half in range(HALVES):
            count, is_counted = _load_counts(inputs, work, tile, tiles_smem, half)
            half_tile = _load_half_tile(inputs, work, geometry, tiles_smem, half)
            for i, sums in enumerate(_sum_over_features(half_tile, scale, geometry.width)):
                offset, rstd = (
                    load_rows(tiles_smem.statistics.at[i, j], half) for j in (_OFFSET, _RSTD)
                )
                totals = []
                values = _token_slopes(sums, count, offset, rstd)
                for total, value in zip(carry[i][half], values, strict=True):
                    if is_counted is not None:
                        value = jnp.where(is_counted, value, jnp.zeros_like(value))
                    totals.append(total + value)
                new[i].append(tuple(totals))
        return new

    # Forward, so that the first tiles of the next kernel are still in the L2 cache.
    carry = stream(
        work,
        scratch.stage,
        lambda tile: input_slices(inputs, work, tile),
        None,
        [[(zero, zero)] * HALVES] * geometry.groups_per_block,
        run_tile,
        reverse=False,
    )
    for i in range(geometry.groups_per_block):
        for half in range(HALVES):
            for j, value in enumerate(carry[i][half]):
                scratch.feature_sums[i, j, pl.ds(half * HALF_TILE, HALF_TILE)] = value
    synchronize()
    for i, group in enumerate(work.groups):
        for j in range(2):
            total = load_lanes(scratch.feature_sums.at[i, j]).sum()
            results[work.row, work.split - first_split, group, j] = total


class _Carry(NamedTuple):
    """Values that a tile passes to the one before it, and sums over tiles.

    Attributes:
      slopes: S and T of the tokens after the tile, scalars, for every group.
      initial: for each token of a tile, as `Gradients.initial`; None if not packed.
      affine: sums of dy (x - m) r and of dy, by feature and every 64th token.
    """

    slopes: list[tuple[Any, Any]]
    initial: list[tuple[Array, ...] | None]
    affine: tuple[Array, Array]


class _GradientsWarpgroup(NamedTuple):
    """A warpgroup of `timestep_norm_gradients`."""

    inputs: KernelInputs
    scratch: KernelScratch
    geometry: TimestepNormGeometry
    work: WorkItem
    scale: Array

    @property
    def is_packed(self) -> bool:
        return self.inputs.documents is not None

    @property
    def groups(self) -> range:
        return range(self.geometry.groups_per_block)

    def run_tile(self, tile, tiles_smem: InputTiles, output_smem, carry: _Carry) -> _Carry:
        results = self.scratch.token_results
        affine = self.sum_over_features(tiles_smem, carry.affine)
        tokens = load_token_info(self.inputs, self.work, tile, tiles_smem)
        synchronize()
        slopes = self.sum_over_tokens(tokens, tiles_smem, carry.slopes)
        initial = [self.store_slopes(i, tokens, slopes[i], carry.initial[i]) for i in self.groups]
        synchronize()
        for half in range(HALVES):
            dx = self.differentiate(tiles_smem, half)
            output_smem[0, pl.ds(half * HALF_TILE, HALF_TILE)] = dx.astype(output_smem.dtype)
        first_slopes = [(results[i, _S, 0], results[i, _T, 0]) for i in self.groups]
        return _Carry(first_slopes, initial, affine)

    def load_half_tile(self, tiles_smem: InputTiles, half: int) -> _HalfTile:
        return _load_half_tile(self.inputs, self.work, self.geometry, tiles_smem, half)

    def sum_over_features(self, tiles_smem: InputTiles, affine: tuple[Array, Array]):
        for half in range(HALVES):
            tile = self.load_half_tile(tiles_smem, half)
            sums_of_groups = _sum_over_features(tile, self.scale, self.geometry.width)
            for i, sums in enumerate(sums_of_groups):
                for j, value in enumerate(sums):
                    rows = pl.ds(half * HALF_TILE, HALF_TILE)
                    self.scratch.feature_sums[i, j, rows] = value
            d_scale = tile.dy * (tile.centered * tile.rstd)
            affine = affine[0] + d_scale, affine[1] + tile.dy
        return affine

    def sum_over_tokens(self, tokens: TokenInfo, tiles_smem: InputTiles, next_slopes):
        """S and T of every token, for every group."""
        values, carried = [], []
        for i in self.groups:
            offset, rstd = (load_lanes(tiles_smem.statistics.at[i, j]) for j in (_OFFSET, _RSTD))
            g, g_centered = (load_lanes(self.scratch.feature_sums.at[i, j]) for j in range(2))
            values += _token_slopes((g, g_centered), tokens.count, offset, rstd)
            carried += [broadcast_scalar(value) for value in next_slopes[i]]
        if self.is_packed:
            zero = jnp.zeros_like(values[0])
            valid = has(tokens.flags, VALID)
            values = [jnp.where(valid, value, zero) for value in values]
            ends_after_tile = tokens.to_end > (TILE - 1) - lane_index()
            carried = [jnp.where(ends_after_tile, value, zero) for value in carried]
        sums = running_sums(self.scratch.sums, values, tokens.to_end, reverse=True)
        slopes = [before + added for before, added in zip(carried, sums, strict=True)]
        return [slopes[2 * i : 2 * i + 2] for i in self.groups]

    def store_slopes(self, i: int, tokens: TokenInfo, slopes, initial):
        """Returns `initial` with the tokens that start documents added."""
        each = 1 / self.geometry.features
        for j, value in enumerate((*slopes, slopes[0] * (2 * each), slopes[1] * each)):
            self.scratch.token_results[i, j, pl.ds(0, TILE)] = value
        if not self.is_packed:
            return None
        starts, later = has(tokens.flags, DOCUMENT_START), has(tokens.flags, LATER_DOCUMENT)
        zero = jnp.zeros_like(slopes[0])
        at_start = [jnp.where(starts, value, zero) for value in slopes]
        of_first = [jnp.where(later, zero, value) for value in at_start]
        of_later = [jnp.where(later, value, zero) for value in at_start]
        return tuple(a + b for a, b in zip(initial, of_first + of_later, strict=True))

    def differentiate(self, tiles_smem: InputTiles, half: int) -> Array:
        tile = self.load_half_tile(tiles_smem, half)
        slope, constant = (
            broadcast_groups(
                [load_rows(self.scratch.token_results.at[i, j], half) for i in self.groups],
                self.geometry.width,
            )
            for j in (_SLOPE, _CONSTANT)
        )
        dx = tile.dy * broadcast_columns(self.scale) * tile.rstd
        dx = dx + (constant + tile.from_pivot * slope)
        return dx if tile.valid is None else jnp.where(tile.valid, dx, jnp.zeros_like(dx))


def gradients_kernel(
    inputs: KernelInputs,
    results: Gradients,
    scratch: KernelScratch,
    *,
    geometry: TimestepNormGeometry,
) -> None:
    """Writes dx and sums for the gradients of all else."""
    work = find_work_item(geometry)
    clear_margins(scratch.sums)
    scale = load_columns(inputs.scale, work.columns)
    warpgroup = _GradientsWarpgroup(inputs, scratch, geometry, work, scale)
    feature_zeros = zeros((HALF_TILE, geometry.block_width), plgpu.Layout.WGMMA)
    token_zeros = zeros((TILE,), LANE_LAYOUT)
    next_slopes = [
        tuple(inputs.next_slopes[work.row, work.split, group, j] for j in range(2))
        for group in work.groups
    ]
    initial = [(token_zeros,) * 4 if warpgroup.is_packed else None for _ in work.groups]
    carry = stream(
        work,
        scratch.stage,
        lambda tile: input_slices(inputs, work, tile),
        lambda tile: work.sequence_slice(results.dx, tile),
        _Carry(next_slopes, initial, (feature_zeros, feature_zeros)),
        warpgroup.run_tile,
        reverse=True,
    )
    for j, value in enumerate(carry.affine):
        results.affine[work.row, work.split, j, work.columns] = value.sum(axis=0)
    for i, group in enumerate(work.groups):
        sums = carry.initial[i]
        values = carry.slopes[i] if sums is None else [value.sum() for value in sums]
        for j, value in enumerate(values):
            results.initial[work.row, work.split, group, j] = value
