"""Kernels of the weights: P = exp2(Q Kᵀ - lse), stored in the band as bfloat16.

Everything is in powers of 2: lse is the base-2 logarithm of the weights' sum. The backward pass
knows lse. The forward pass does not, and stores exp2(Q Kᵀ): `band_product` divides by the sums.
That is exact while a query's sum stays far from the ends of float32's range. The repair kernel
recomputes other queries' weights with the maximum subtracted; it does nothing where there are none.
Whether a query is repaired depends only on the keys that it sees, so documents stay independent.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chunk_attention.mosaic_gpu.band import (
    TILE,
    AttentionGeometry,
    Band,
    BandTile,
    BandTiles,
    count_key_tiles,
    first_key_tile,
)
from pallas_kernels.chunk_attention.mosaic_gpu.pipeline import (
    ROW_LAYOUT,
    WARPGROUP_ROWS,
    Accumulator,
    Pipeline,
    load_row_values,
    warp_specialize,
)

# Scores that one consumer warpgroup computes at once.
SCORES_SHAPE = (WARPGROUP_ROWS, TILE)
_LOG2_E = math.log2(math.e)
# Sums of unnormalized weights between 2^-40 and 2^40 need no repair.
MAX_LOG2_SUM = 40.0


def _over_columns(row_values: Any) -> Any:
    return lax.broadcast_in_dim(row_values, SCORES_SHAPE, [0])


def _query_tokens(tile: BandTile, warpgroup: Any) -> Any:
    return pl.ds(tile.query_tile * TILE + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)


def _compute_scores(pipeline: Pipeline, step: Any, q_smem: Any, k_smem: Any) -> Any:
    """Scores of a step's key tile in powers of 2."""
    stage = lax.rem(step, pipeline.num_stages)
    plgpu.barrier_wait(pipeline.full_barrier.at[stage])

    def multiply(acc):
        plgpu.wgmma(acc, q_smem, k_smem.at[stage].transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return acc[...]

    scores = pl.run_scoped(multiply, Accumulator(SCORES_SHAPE, jnp.float32)) * _LOG2_E
    plgpu.barrier_arrive(pipeline.consumed_barrier.at[stage])
    return scores


def _mask(
    band: Band,
    geometry: AttentionGeometry,
    tile: BandTile,
    warpgroup: Any,
    values: Any,
    masked_value: float,
) -> Any:
    """Selects `masked_value` for keys that a query does not see; their values may be infinite."""
    first_query = tile.query_tile * TILE + warpgroup * WARPGROUP_ROWS
    key_tile = first_key_tile(band, geometry, tile.row, tile.query_tile) + tile.column

    def mask(values):
        starts = load_row_values(band.starts.at[tile.row, pl.ds(first_query, WARPGROUP_ROWS)])
        query = plgpu.broadcasted_iota(jnp.int32, SCORES_SHAPE, 0, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, SCORES_SHAPE, 1, layout=plgpu.Layout.WGMMA)
        key = key + key_tile * TILE
        own_key = query + (first_query + geometry.key_tile_offset * TILE)
        is_visible = (key <= own_key) & (key >= _over_columns(starts))
        return jnp.where(is_visible, values, masked_value)

    is_unmasked = key_tile < tile.query_tile + geometry.key_tile_offset
    if not geometry.is_aligned:
        first_unmasked = band.first_unmasked_key_tile[tile.row, tile.query_tile]
        is_unmasked = is_unmasked & (key_tile >= first_unmasked)
    return lax.cond(is_unmasked, lambda values: values, mask, values)


def _round_to_smem(values: Any, smem: Any) -> None:
    """Rounds a warpgroup's weights to shared memory, once the previous copy has read it."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem[...] = values.astype(smem.dtype)
    plgpu.commit_smem()


class WeightsOperands(NamedTuple):
    """Operands of `weights_kernel`; `lse` is None for unnormalized weights."""

    band: Band
    q: Any
    k: Any
    lse: Any


class WeightsResults(NamedTuple):
    """Results of `weights_kernel`; `sums`, one for each query and key tile, are None with lse."""

    weights: Any
    sums: Any


class WeightsScratch(NamedTuple):
    """Shared memory and barriers of `weights_kernel`."""

    q_smem: Any
    k_smem: Any
    weights_smem: Any
    q_full_barrier: Any
    q_consumed_barrier: Any
    pipeline: Pipeline


class _WeightsKernelCall(NamedTuple):
    operands: WeightsOperands
    results: WeightsResults
    scratch: WeightsScratch
    geometry: AttentionGeometry
    begin: Any
    end: Any

    def for_each_tile(self, visit: Any) -> Any:
        """Runs `visit(step, tile, is_new, is_first)` for the block's tiles; returns their number.

        is_new: whether the tile's queries differ from the previous tile's.
        """
        band, geometry = self.operands.band, self.geometry
        tiles = BandTiles(geometry, 1)

        def body(index, carry):
            step, previous = carry
            tile, is_valid = tiles.locate(band, index)
            queries = (tile.row * geometry.heads + tile.head) * geometry.query_tiles
            queries = queries + tile.query_tile
            is_new = queries != previous
            pl.when(is_valid)(lambda: visit(step, tile, is_new, previous < 0))
            step = jnp.where(is_valid, step + 1, step)
            return step, jnp.where(is_valid, queries, previous)

        return lax.fori_loop(self.begin, self.end, body, (jnp.int32(0), jnp.int32(-1)))[0]

    def produce(self):
        operands, scratch = self.operands, self.scratch

        def visit(step, tile, is_new, is_first):
            @pl.when(is_new)
            def _():
                wait = partial(plgpu.barrier_wait, scratch.q_consumed_barrier)
                pl.when(jnp.logical_not(is_first))(wait)
                q_gmem = operands.q.at[tile.row, pl.ds(tile.query_tile * TILE, TILE), tile.head]
                plgpu.copy_gmem_to_smem(q_gmem, scratch.q_smem, scratch.q_full_barrier)

            def copy_keys(_, stage, barrier):
                first = first_key_tile(operands.band, self.geometry, tile.row, tile.query_tile)
                tokens = pl.ds((first + tile.column) * TILE, TILE)
                k_gmem = operands.k.at[tile.row, tokens, tile.head]
                plgpu.copy_gmem_to_smem(k_gmem, scratch.k_smem.at[stage], barrier)

            scratch.pipeline.produce(step, 1, copy_keys)

        scratch.pipeline.producer_tail(self.for_each_tile(visit))

    def consume(self, warpgroup):
        (band, _, _, lse), scratch = self.operands, self.scratch
        rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        weights_smem = scratch.weights_smem.at[warpgroup]
        q_smem = scratch.q_smem.at[rows]

        def visit(step, tile, is_new, is_first):
            @pl.when(is_new)
            def _():
                arrive = partial(plgpu.barrier_arrive, scratch.q_consumed_barrier)
                pl.when(jnp.logical_not(is_first))(arrive)
                plgpu.barrier_wait(scratch.q_full_barrier)

            row_lse = None
            if lse is not None:
                queries = _query_tokens(tile, warpgroup)
                row_lse = load_row_values(lse.at[tile.row, tile.head, queries])
            values = _compute_scores(scratch.pipeline, step, q_smem, scratch.k_smem)
            if row_lse is not None:
                values = values - _over_columns(row_lse)
            values = _mask(band, self.geometry, tile, warpgroup, jnp.exp2(values), 0.0)
            _round_to_smem(values, weights_smem)
            row, head, query_tile, column = tile
            columns = pl.ds(column * TILE, TILE)
            weights_gmem = self.results.weights.at[row, head, query_tile, rows, columns]
            plgpu.copy_smem_to_gmem(weights_smem, weights_gmem)
            if self.results.sums is not None:
                self.results.sums[row, head, query_tile, column, rows] = values.sum(axis=1)

        self.for_each_tile(visit)
        plgpu.wait_smem_to_gmem(0)


def weights_kernel(
    operands: WeightsOperands,
    results: WeightsResults,
    scratch: WeightsScratch,
    *,
    geometry: AttentionGeometry,
    num_blocks: int,
) -> None:
    """Weights of a contiguous run of the band's tiles; without lse also every tile's row sums."""
    total, block = math.prod(BandTiles(geometry, 1).sizes), lax.axis_index("block")
    begin, end = (lax.div((block + i) * total, num_blocks) for i in range(2))
    call = _WeightsKernelCall(operands, results, scratch, geometry, begin, end)
    warp_specialize(call.produce, call.consume)


class RepairOperands(NamedTuple):
    """Operands of `repair_kernel`; `needs_repair` is 1 for query tiles to repair, else 0."""

    band: Band
    needs_repair: Any
    q: Any
    k: Any
    scale: Any
    lse: Any


class RepairResults(NamedTuple):
    """Results of `repair_kernel`; weights are undefined for query tiles without repair."""

    weights: Any
    scale: Any
    lse: Any


class RepairScratch(NamedTuple):
    """Shared memory and barriers of `repair_kernel`."""

    q_smem: Any
    k_smem: Any
    weights_smem: Any
    q_full_barrier: Any
    pipeline: Pipeline


class _RepairKernelCall(NamedTuple):
    operands: RepairOperands
    results: RepairResults
    scratch: RepairScratch
    geometry: AttentionGeometry
    row: Any
    head: Any
    query_tile: Any
    num_key_tiles: Any
    num_passes: Any

    def band_tile(self, column: Any) -> BandTile:
        return BandTile(self.row, self.head, self.query_tile, column)

    def produce(self):
        operands, scratch = self.operands, self.scratch

        def copy_keys(step, stage, barrier):
            first = first_key_tile(operands.band, self.geometry, self.row, self.query_tile)
            tokens = pl.ds((first + lax.rem(step, self.num_key_tiles)) * TILE, TILE)
            k_gmem = operands.k.at[self.row, tokens, self.head]
            plgpu.copy_gmem_to_smem(k_gmem, scratch.k_smem.at[stage], barrier)

        @pl.when(self.num_passes > 0)
        def _():
            q_gmem = operands.q.at[self.row, pl.ds(self.query_tile * TILE, TILE), self.head]
            plgpu.copy_gmem_to_smem(q_gmem, scratch.q_smem, scratch.q_full_barrier)

        scratch.pipeline.produce(0, self.num_passes * self.num_key_tiles, copy_keys)
        scratch.pipeline.producer_tail(self.num_passes * self.num_key_tiles)

    def consume(self, warpgroup):
        pl.when(self.num_passes == 0)(lambda: self._copy_statistics(warpgroup))
        pl.when(self.num_passes > 0)(lambda: self._repair(warpgroup))

    def _queries(self, warpgroup):
        return self.row, self.head, _query_tokens(self.band_tile(0), warpgroup)

    def _copy_statistics(self, warpgroup):
        queries = self._queries(warpgroup)
        old = (load_row_values(a.at[queries]) for a in (self.operands.scale, self.operands.lse))
        self.results.scale[queries], self.results.lse[queries] = old

    def _repair(self, warpgroup):
        operands, results, scratch = self.operands, self.results, self.scratch
        queries = self._queries(warpgroup)
        rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        weights_smem = scratch.weights_smem.at[warpgroup]
        q_smem = scratch.q_smem.at[rows]
        plgpu.barrier_wait(scratch.q_full_barrier)
        m_i, l_i = self._softmax_statistics(q_smem, warpgroup)
        old_scale, old_lse = (load_row_values(a.at[queries]) for a in operands[-2:])
        # The other queries of the tile stay as they are, bit by bit.
        is_valid = jnp.abs(old_lse) <= MAX_LOG2_SUM
        new_lse = jnp.where(l_i > 0, m_i + jnp.log2(l_i), 0.0)
        normalizer = jnp.where(is_valid, 0.0, new_lse)
        results.scale[queries] = jnp.where(is_valid, old_scale, 1.0)
        results.lse[queries] = jnp.where(is_valid, old_lse, new_lse)

        def write(column, _):
            step = self.num_key_tiles + column
            scores = _compute_scores(scratch.pipeline, step, q_smem, scratch.k_smem)
            values = jnp.exp2(scores - _over_columns(normalizer))
            tile = self.band_tile(column)
            values = _mask(operands.band, self.geometry, tile, warpgroup, values, 0.0)
            _round_to_smem(values, weights_smem)
            columns = pl.ds(column * TILE, TILE)
            weights_gmem = results.weights.at[self.row, self.head, self.query_tile, rows, columns]
            plgpu.copy_smem_to_gmem(weights_smem, weights_gmem)
            return ()

        lax.fori_loop(0, self.num_key_tiles, write, ())
        plgpu.wait_smem_to_gmem(0)

    def _softmax_statistics(self, q_smem, warpgroup):
        """Every query's greatest score and sum of exp2(score - greatest), online."""
        scratch = self.scratch

        def add_tile(column, carry):
            m_i, l_i = carry
            scores = _compute_scores(scratch.pipeline, column, q_smem, scratch.k_smem)
            tile = self.band_tile(column)
            scores = _mask(self.operands.band, self.geometry, tile, warpgroup, scores, -jnp.inf)
            new_m_i = jnp.maximum(m_i, scores.max(axis=1))
            # -inf - -inf is NaN for a query that has seen no key yet.
            finite_m_i = jnp.where(new_m_i == -jnp.inf, 0.0, new_m_i)
            weights = jnp.exp2(scores - _over_columns(finite_m_i))
            return new_m_i, l_i * jnp.exp2(m_i - finite_m_i) + weights.sum(axis=1)

        start = tuple(
            plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), ROW_LAYOUT)
            for value in (-jnp.inf, 0.0)
        )
        return lax.fori_loop(0, self.num_key_tiles, add_tile, start)


def repair_kernel(
    operands: RepairOperands,
    results: RepairResults,
    scratch: RepairScratch,
    *,
    geometry: AttentionGeometry,
) -> None:
    """Normalized weights of one query tile's queries whose sums are out of range."""
    row, head, tile = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("i")
    num_key_tiles = count_key_tiles(operands.band, geometry, row, tile)
    # The first pass computes the softmax's statistics, the second one writes weights.
    num_passes = jnp.where(operands.needs_repair[row, head, tile] != 0, 2, 0)
    call = _RepairKernelCall(
        operands, results, scratch, geometry, row, head, tile, num_key_tiles, num_passes
    )
    warp_specialize(call.produce, call.consume)
