"""Weights on Hopper: P = exp2(Q Kᵀ - normalizer), stored in the band as bfloat16.

In powers of 2: the normalizer of the backward pass is the logarithm of the weights' sum. The
forward pass has none, which gives weights that `band_product` divides by their sum, as long as
every query's sum stays near 1 in float32's range; the rare others are repaired with the greatest
score in a second kernel, which does nothing otherwise. Whether a query is repaired depends on the
keys that it sees alone, so it changes nothing for other documents.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels.chunk_attention.mosaic_gpu.band import (
    TILE,
    Band,
    Geometry,
    Spans,
    count_key_tiles,
    first_key_tile,
)
from pallas_kernels.chunk_attention.mosaic_gpu.pipeline import (
    ROW_LAYOUT,
    ROWS,
    Accumulator,
    by_warpgroup,
    count_blocks,
    launch,
    load_rows,
    staged,
)

_SHAPE = (ROWS, TILE)
_LOG2_E = math.log2(math.e)
# Sums of weights without a normalizer between 2^-40 and 2^40 are kept: weights and outputs are far
# from the ends of float32's range then.
_LARGEST_LOG = 40.0


def _over_columns(values: Any) -> Any:
    return lax.broadcast_in_dim(values, _SHAPE, [0])


def _scores(pipe: Any, step: Any, q_rows: Any, k_s: Any) -> Any:
    """Scores of a step's key tile in powers of 2."""
    slot = lax.rem(step, pipe.count)
    plgpu.barrier_wait(pipe.full.at[slot])

    def multiply(acc):
        plgpu.wgmma(acc, q_rows, k_s.at[slot].transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return acc[...]

    scores = pl.run_scoped(multiply, Accumulator(_SHAPE, jnp.float32)) * _LOG2_E
    plgpu.barrier_arrive(pipe.free.at[slot])
    return scores


def _where_seen(
    band: Band, geometry: Geometry, place: Any, warpgroup: Any, values: Any, otherwise: float
) -> Any:
    """A selection, so that nothing of what a query does not see gets through."""
    row, tile, column = place
    own = tile * TILE + warpgroup * ROWS
    key_tile = first_key_tile(band, geometry, row, tile) + column

    def mask(values):
        starts = load_rows(band.starts.at[row, pl.ds(own, ROWS)])
        query = plgpu.broadcasted_iota(jnp.int32, _SHAPE, 0, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, _SHAPE, 1, layout=plgpu.Layout.WGMMA)
        key = key + key_tile * TILE
        seen = (key <= query + (own + geometry.offset * TILE)) & (key >= _over_columns(starts))
        return jnp.where(seen, values, otherwise)

    is_whole = key_tile < tile + geometry.offset
    if not geometry.is_regular:
        is_whole = is_whole & (key_tile >= band.whole[row, tile])
    return lax.cond(is_whole, lambda values: values, mask, values)


def _weights_kernel(
    pipe, band, q, k, lse, results, q_s, k_s, p_s, q_full, q_free, *, geometry, blocks
):
    """Weights of a run of tiles of the band; with each tile's sums unless lse is given."""
    weights, sums = results
    spans = Spans(geometry, 1)
    total, block = math.prod(spans.sizes), lax.axis_index("block")
    begin, end = (lax.div((block + i) * total, blocks) for i in range(2))

    def walk(visit):
        """`visit(step, is_new, is_first, place)` at every tile; `is_new`: of other queries."""

        def body(index, carry):
            step, before = carry
            *place, is_live = spans.find(band, index)
            row, head, tile, _ = place
            queries = (row * geometry.heads + head) * geometry.query_tiles + tile
            is_new = queries != before
            pl.when(is_live)(lambda: visit(step, is_new, before < 0, tuple(place)))
            return jnp.where(is_live, step + 1, step), jnp.where(is_live, queries, before)

        return lax.fori_loop(begin, end, body, (jnp.int32(0), jnp.int32(-1)))[0]

    def copy():
        def visit(step, is_new, is_first, place):
            row, head, tile, column = place

            @pl.when(is_new)
            def _():
                pl.when(jnp.logical_not(is_first))(lambda: plgpu.barrier_wait(q_free))
                tokens = pl.ds(tile * TILE, TILE)
                plgpu.copy_gmem_to_smem(q.at[row, tokens, head], q_s, q_full)

            def copy_key(_, slot, barrier):
                key_tile = first_key_tile(band, geometry, row, tile) + column
                tokens = pl.ds(key_tile * TILE, TILE)
                plgpu.copy_gmem_to_smem(k.at[row, tokens, head], k_s.at[slot], barrier)

            pipe.fill(step, 1, copy_key)

        pipe.drain(walk(visit))

    def compute(warpgroup):
        rows, out = pl.ds(warpgroup * ROWS, ROWS), p_s.at[warpgroup]
        q_rows = q_s.at[rows]

        def visit(step, is_new, is_first, place):
            row, head, tile, column = place

            @pl.when(is_new)
            def _():
                pl.when(jnp.logical_not(is_first))(lambda: plgpu.barrier_arrive(q_free))
                plgpu.barrier_wait(q_full)

            normalizer = None
            if lse is not None:
                own = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
                normalizer = load_rows(lse.at[row, head, own])
            values = _scores(pipe, step, q_rows, k_s)
            if normalizer is not None:
                values = values - _over_columns(normalizer)
            seen = row, tile, column
            values = _where_seen(band, geometry, seen, warpgroup, jnp.exp2(values), 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[...] = values.astype(out.dtype)
            plgpu.commit_smem()
            columns = pl.ds(column * TILE, TILE)
            plgpu.copy_smem_to_gmem(out, weights.at[row, head, tile, rows, columns])
            if sums is not None:
                sums[row, head, tile, column, rows] = values.sum(axis=1)

        walk(visit)
        plgpu.wait_smem_to_gmem(0)

    by_warpgroup(copy, compute)


def _make_weights(band, q, k, lse, geometry, interpret):
    shape = None
    if lse is None:
        shape = jax.ShapeDtypeStruct(
            (geometry.rows, geometry.heads, geometry.query_tiles, geometry.width, TILE), jnp.float32
        )
    blocks = count_blocks(math.prod(Spans(geometry, 1).sizes), interpret)
    return launch(
        partial(_weights_kernel, geometry=geometry, blocks=blocks),
        (band, q, k, lse),
        (jax.ShapeDtypeStruct(geometry.shape, jnp.bfloat16), shape),
        name="chunk_attention_weights",
        grid={"block": blocks},
        scratch=[
            staged(TILE, q.shape[3]),
            staged(2, TILE, q.shape[3]),
            staged(2, *_SHAPE),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=2),
        ],
        stages=2,
        copies=1,
        interpret=interpret,
    )


def make_weights(
    band: Band,
    q: BFloat16[Array, "B L H Dk"],
    k: BFloat16[Array, "B M H Dk"],
    lse: Float[Array, "B H L"],
    geometry: Geometry,
    interpret: Any,
) -> BFloat16[Array, "B H I 128 W"]:
    """Softmax weights in the band, of scores whose logsumexp in powers of 2 is known.

    Columns of a query tile count from its first key tile; what it does not see is undefined.
    """
    return _make_weights(band, q, k, lse, geometry, interpret)[0]


class FirstWeights(NamedTuple):
    """Weights that are not normalized yet, in the band.

    Attributes:
      weights: of most query tiles.
      repaired: of the others; undefined elsewhere.
      is_repaired: 1 for query tiles whose weights are in `repaired`.
      scale: what turns weights into a softmax.
      lse: logsumexp of the scores in powers of 2.
    """

    weights: BFloat16[Array, "B H I 128 W"]
    repaired: BFloat16[Array, "B H I 128 W"]
    is_repaired: Int32[Array, "B H I"]
    scale: Float[Array, "B H L"]
    lse: Float[Array, "B H L"]


def make_first_weights(
    band: Band,
    q: BFloat16[Array, "B L H Dk"],
    k: BFloat16[Array, "B M H Dk"],
    geometry: Geometry,
    interpret: Any,
) -> FirstWeights:
    """Weights in the band of scores of which nothing is known yet."""
    weights, sums = _make_weights(band, q, k, None, geometry, interpret)
    rows, heads, tiles = geometry.shape[:3]
    count = jnp.arange(tiles) + geometry.offset + 1 - band.first
    is_made = jnp.arange(geometry.width) < count[..., None]
    total = jnp.where(is_made[:, None, :, :, None], sums, 0).sum(axis=3)
    index = geometry.offset * TILE + jnp.arange(tiles * TILE, dtype=jnp.int32)
    sees = (band.starts <= index).reshape(rows, 1, tiles, TILE)
    lse = jnp.where(sees, jnp.log2(total), 0.0)
    scale = jnp.where(sees, 1 / total, 0.0)
    # Not a number is not kept either.
    is_bad = jnp.logical_not(jnp.abs(lse) <= _LARGEST_LOG).any(axis=3).astype(jnp.int32)
    lse, scale = (a.reshape(rows, heads, tiles * TILE) for a in (lse, scale))
    repaired, scale, lse = _repair(band, is_bad, q, k, scale, lse, geometry, interpret)
    return FirstWeights(weights, repaired, is_bad, scale, lse)


def _repair_kernel(
    pipe, band, is_bad, q, k, scale, lse, results, q_s, k_s, p_s, q_full, *, geometry
):
    """Weights of a query tile's queries once more, normalized, where their sum was too far off."""
    row, head, tile = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("i")
    weights, new_scale, new_lse = results
    count = count_key_tiles(band, geometry, row, tile)
    passes = jnp.where(is_bad[row, head, tile] != 0, 2, 0)

    def copy():
        def copy_key(step, slot, barrier):
            key_tile = first_key_tile(band, geometry, row, tile) + lax.rem(step, count)
            tokens = pl.ds(key_tile * TILE, TILE)
            plgpu.copy_gmem_to_smem(k.at[row, tokens, head], k_s.at[slot], barrier)

        @pl.when(passes > 0)
        def _():
            plgpu.copy_gmem_to_smem(q.at[row, pl.ds(tile * TILE, TILE), head], q_s, q_full)

        pipe.fill(0, passes * count, copy_key)
        pipe.drain(passes * count)

    def keep(warpgroup):
        own = row, head, pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
        new_scale[own], new_lse[own] = (load_rows(a.at[own]) for a in (scale, lse))

    def repair(warpgroup):
        own = row, head, pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
        rows, out = pl.ds(warpgroup * ROWS, ROWS), p_s.at[warpgroup]
        q_rows = q_s.at[rows]
        plgpu.barrier_wait(q_full)

        def add_up(column, carry):
            peak, total = carry
            scores = _scores(pipe, column, q_rows, k_s)
            place = row, tile, column
            scores = _where_seen(band, geometry, place, warpgroup, scores, -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(axis=1))
            # A row that sees nothing yet has no peak to subtract.
            safe = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
            weights = jnp.exp2(scores - _over_columns(safe))
            return new_peak, total * jnp.exp2(peak - safe) + weights.sum(axis=1)

        start = (
            plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW_LAYOUT),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW_LAYOUT),
        )
        peak, total = lax.fori_loop(0, count, add_up, start)
        old_scale, old_lse = (load_rows(a.at[own]) for a in (scale, lse))
        is_kept = jnp.abs(old_lse) <= _LARGEST_LOG
        right_lse = jnp.where(total > 0, peak + jnp.log2(total), 0.0)
        normalizer = jnp.where(is_kept, 0.0, right_lse)
        new_scale[own] = jnp.where(is_kept, old_scale, 1.0)
        new_lse[own] = jnp.where(is_kept, old_lse, right_lse)

        def write(column, _):
            scores = _scores(pipe, count + column, q_rows, k_s)
            values = jnp.exp2(scores - _over_columns(normalizer))
            place = row, tile, column
            values = _where_seen(band, geometry, place, warpgroup, values, 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[...] = values.astype(out.dtype)
            plgpu.commit_smem()
            columns = pl.ds(column * TILE, TILE)
            plgpu.copy_smem_to_gmem(out, weights.at[row, head, tile, rows, columns])
            return ()

        lax.fori_loop(0, count, write, ())
        plgpu.wait_smem_to_gmem(0)

    def compute(warpgroup):
        pl.when(passes == 0)(lambda: keep(warpgroup))
        pl.when(passes > 0)(lambda: repair(warpgroup))

    by_warpgroup(copy, compute)


def _repair(
    band: Band,
    is_bad: Int32[Array, "B H I"],
    q: Array,
    k: Array,
    scale: Array,
    lse: Array,
    geometry: Geometry,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    return launch(
        partial(_repair_kernel, geometry=geometry),
        (band, is_bad, q, k, scale, lse),
        (
            jax.ShapeDtypeStruct(geometry.shape, jnp.bfloat16),
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (scale, lse)),
        ),
        name="chunk_attention_repair",
        grid={"i": geometry.query_tiles, "h": geometry.heads, "b": geometry.rows},
        scratch=[
            staged(TILE, q.shape[3]),
            staged(2, TILE, q.shape[3]),
            staged(2, *_SHAPE),
            plgpu.Barrier(num_arrivals=1),
        ],
        stages=2,
        copies=1,
        interpret=interpret,
    )
