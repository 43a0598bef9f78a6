"""Chunk attention on Hopper in matrix products over a band of scores.

Query t sees the keys start[t] .. t, so a tile of 128 queries sees a run of key tiles that ends at
its own: its row of the band. Value heads are up to eight times as wide as key heads, so weights are
made once, stored as bfloat16, and multiplied by the values tile by tile:

    weights         P = exp(Q Kᵀ - logsumexp), masked, row by row of the band
    band_product    O = P V,   dQ = dS K
    score_gradient  dS = P * (dO Vᵀ - rowsum(dO * O))
    band_transpose_product   dV = Pᵀ dO,   dK = dSᵀ Q

Every kernel has two warpgroups that multiply and one that copies ahead of them.
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

from pallas_kernels.chunk_attention.mosaic_gpu_pipeline import (
    by_warpgroup,
    launch,
    staged,
    store,
)

TILE = 128
_ROWS = TILE // 2
_DEPTH = 64
_WIDTH = 256
_STAGES = 3
# Public, but type checkers do not see it.
_Accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
_ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
_LOG2_E = math.log2(math.e)


class Band(NamedTuple):
    """Which key tiles the query tiles see, and by which query tiles a key tile is seen.

    Attributes:
      starts: first key of every query; beyond the query's own if it sees none.
      first: first key tile of every query tile.
      whole: key tiles from this one up to the query tile's own are seen whole.
      last: last query tile that sees a key tile.
    """

    starts: Int32[Array, "B L"]
    first: Int32[Array, "B I"]
    whole: Int32[Array, "B I"]
    last: Int32[Array, "B J"]


class Geometry(NamedTuple):
    """Static sizes.

    Attributes:
      rows: B.
      heads: H.
      query_tiles: I, tiles of queries in a row.
      offset: key tiles before the first query's own.
      width: most key tiles of a query tile.
    """

    rows: int
    heads: int
    query_tiles: int
    offset: int
    width: int


def _count(band: Band, geometry: Geometry, row: Any, tile: Any) -> Any:
    return tile + geometry.offset + 1 - band.first[row, tile]


def _scores_kernel(pipe, band, q, k, lse, results, q_s, k_s, p_s, q_full, *, geometry: Geometry):
    """Weights of a query tile; with their logsumexp unless it is given."""
    weights, new_lse = results
    row, head, tile = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("i")
    count = _count(band, geometry, row, tile)
    passes = 1 if lse is not None else 2

    def copy():
        def copy_key(step, slot, barrier):
            tokens = pl.ds((band.first[row, tile] + lax.rem(step, count)) * TILE, TILE)
            plgpu.copy_gmem_to_smem(k.at[row, tokens, head], k_s.at[slot], barrier)

        plgpu.copy_gmem_to_smem(q.at[row, pl.ds(tile * TILE, TILE), head], q_s, q_full)
        pipe.fill(passes * count, copy_key)

    def compute(warpgroup):
        own = tile * TILE + warpgroup * _ROWS
        starts = plgpu.load(
            band.starts.at[row, pl.ds(own, _ROWS)], layout=_ROW_LAYOUT, optimized=False
        )
        q_rows = q_s.at[pl.ds(warpgroup * _ROWS, _ROWS)]
        out = p_s.at[warpgroup]
        plgpu.barrier_wait(q_full)

        def scores_of(step):
            """Scores of the step's key tile in powers of 2, and the number of the tile."""
            slot = lax.rem(step, pipe.count)
            plgpu.barrier_wait(pipe.full.at[slot])

            def multiply(acc):
                plgpu.wgmma(acc, q_rows, k_s.at[slot].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return acc[...]

            scores = pl.run_scoped(multiply, _Accumulator((_ROWS, TILE), jnp.float32)) * _LOG2_E
            plgpu.barrier_arrive(pipe.free.at[slot])
            return scores, band.first[row, tile] + lax.rem(step, count)

        def where_seen(key_tile, values, otherwise):
            """A selection, so that nothing of what a query does not see gets through."""

            def mask(values):
                shape = (_ROWS, TILE)
                query = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                key = key + key_tile * TILE
                seen = (key <= query + (own + geometry.offset * TILE)) & (
                    key >= lax.broadcast_in_dim(starts, shape, [0])
                )
                return jnp.where(seen, values, otherwise)

            is_whole = (key_tile >= band.whole[row, tile]) & (key_tile < tile + geometry.offset)
            return lax.cond(is_whole, lambda values: values, mask, values)

        def add_up(step, carry):
            peak, total = carry
            scores, key_tile = scores_of(step)
            scores = where_seen(key_tile, scores, -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(axis=1))
            # A row that sees nothing yet has no peak to subtract.
            safe = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(safe, scores.shape, [0]))
            return new_peak, total * jnp.exp2(peak - safe) + weights.sum(axis=1)

        if lse is None:
            start = (
                plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), _ROW_LAYOUT),
                plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), _ROW_LAYOUT),
            )
            peak, total = lax.fori_loop(0, count, add_up, start)
            # Nothing seen: any finite number gives weights of zero.
            normalizer = jnp.where(total > 0, peak + jnp.log2(total), 0.0)
            new_lse[row, head, pl.ds(own, _ROWS)] = normalizer
        else:
            normalizer = plgpu.load(
                lse.at[row, head, pl.ds(own, _ROWS)], layout=_ROW_LAYOUT, optimized=False
            )

        def write(i, _):
            scores, key_tile = scores_of((passes - 1) * count + i)
            values = jnp.exp2(scores - lax.broadcast_in_dim(normalizer, scores.shape, [0]))
            values = where_seen(key_tile, values, 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[...] = values.astype(out.dtype)
            plgpu.commit_smem()
            rows, columns = pl.ds(warpgroup * _ROWS, _ROWS), pl.ds(i * TILE, TILE)
            plgpu.copy_smem_to_gmem(out, weights.at[row, head, tile, rows, columns])
            return ()

        lax.fori_loop(0, count, write, ())
        plgpu.wait_smem_to_gmem(0)

    by_warpgroup(copy, compute)


def _band_shape(geometry: Geometry) -> jax.ShapeDtypeStruct:
    tiles = (geometry.rows, geometry.heads, geometry.query_tiles)
    return jax.ShapeDtypeStruct((*tiles, TILE, geometry.width * TILE), jnp.bfloat16)


def make_weights(
    band: Band,
    q: BFloat16[Array, "B L H Dk"],
    k: BFloat16[Array, "B M H Dk"],
    lse: Float[Array, "B H L"] | None,
    geometry: Geometry,
    interpret: Any,
) -> tuple[BFloat16[Array, "B H I 128 W"], Float[Array, "B H L"]]:
    """Softmax weights in the band and the logsumexp of the scores in powers of 2.

    Columns of a query tile count from its first key tile; what it does not see is undefined.
    """
    depth = q.shape[3]
    shape = None
    if lse is None:
        shape = jax.ShapeDtypeStruct(
            (geometry.rows, geometry.heads, geometry.query_tiles * TILE), jnp.float32
        )
    weights, new_lse = launch(
        partial(_scores_kernel, geometry=geometry),
        (band, q, k, lse),
        (_band_shape(geometry), shape),
        name="chunk_attention_weights",
        grid={"i": geometry.query_tiles, "h": geometry.heads, "b": geometry.rows},
        scratch=[
            staged(TILE, depth),
            staged(2, TILE, depth),
            staged(2, _ROWS, TILE),
            plgpu.Barrier(num_arrivals=1),
        ],
        stages=2,
        copies=1,
        interpret=interpret,
    )
    return weights, new_lse if lse is None else lse


def _band_product_kernel(pipe, band, weights, x, out, a_s, x_s, out_s, *, geometry, width):
    row, head, tile = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("i")
    columns = pl.ds(lax.axis_index("n") * width, width)
    steps = _count(band, geometry, row, tile) * (TILE // _DEPTH)

    def copy():
        def copy_step(step, slot, barrier):
            token = band.first[row, tile] * TILE + step * _DEPTH
            part = weights.at[row, head, tile, :, pl.ds(step * _DEPTH, _DEPTH)]
            plgpu.copy_gmem_to_smem(part, a_s.at[slot], barrier)
            values = x.at[row, pl.ds(token, _DEPTH), head, columns]
            plgpu.copy_gmem_to_smem(values, x_s.at[slot], barrier)

        pipe.fill(steps, copy_step)

    def compute(warpgroup):
        rows = pl.ds(warpgroup * _ROWS, _ROWS)

        def multiply(acc):
            def add(step, slot):
                plgpu.wgmma(acc, a_s.at[slot, rows], x_s.at[slot])

            pipe.multiply(0, steps, add)
            return acc[...]

        total = pl.run_scoped(multiply, _Accumulator((_ROWS, width), jnp.float32))
        tokens = pl.ds(tile * TILE + warpgroup * _ROWS, _ROWS)
        store(out_s.at[warpgroup], out.at[row, tokens, head, columns], total)

    by_warpgroup(copy, compute)


def band_product(
    band: Band,
    weights: BFloat16[Array, "B H I 128 W"],
    x: BFloat16[Array, "B M H D"],
    geometry: Geometry,
    interpret: Any,
) -> BFloat16[Array, "B L H D"]:
    """Σ_s weights[t, s] x[s]."""
    width = min(_WIDTH, x.shape[3])
    length = geometry.query_tiles * TILE
    shape = (geometry.rows, length, geometry.heads, x.shape[3])
    return launch(
        partial(_band_product_kernel, geometry=geometry, width=width),
        (band, weights, x),
        jax.ShapeDtypeStruct(shape, x.dtype),
        name="chunk_attention_band_product",
        grid={
            "n": x.shape[3] // width,
            "i": geometry.query_tiles,
            "h": geometry.heads,
            "b": geometry.rows,
        },
        scratch=[
            staged(_STAGES, TILE, _DEPTH),
            staged(_STAGES, _DEPTH, width),
            staged(2, _ROWS, width),
        ],
        stages=_STAGES,
        copies=2,
        interpret=interpret,
    )


def _transpose_product_kernel(pipe, band, weights, y, out, a_s, y_s, out_s, *, geometry, width):
    row, head, tile = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("j")
    columns = pl.ds(lax.axis_index("n") * width, width)
    first = jnp.maximum(tile - geometry.offset, 0)
    halves = TILE // _DEPTH
    steps = jnp.maximum(band.last[row, tile] + 1 - first, 0) * halves

    def copy():
        def copy_step(step, slot, barrier):
            query = first + lax.div(step, halves)
            half = lax.rem(step, halves) * _DEPTH
            keys = pl.ds((tile - band.first[row, query]) * TILE, TILE)
            part = weights.at[row, head, query, pl.ds(half, _DEPTH), keys]
            plgpu.copy_gmem_to_smem(part, a_s.at[slot], barrier)
            values = y.at[row, pl.ds(query * TILE + half, _DEPTH), head, columns]
            plgpu.copy_gmem_to_smem(values, y_s.at[slot], barrier)

        pipe.fill(steps, copy_step)

    def compute(warpgroup):
        rows = pl.ds(warpgroup * _ROWS, _ROWS)

        def multiply(acc):
            def add(step, slot):
                plgpu.wgmma(acc, a_s.at[slot, :, rows].transpose((1, 0)), y_s.at[slot])

            pipe.multiply(0, steps, add)
            return acc[...]

        total = pl.run_scoped(multiply, _Accumulator((_ROWS, width), jnp.float32))
        tokens = pl.ds(tile * TILE + warpgroup * _ROWS, _ROWS)
        store(out_s.at[warpgroup], out.at[row, tokens, head, columns], total)

    by_warpgroup(copy, compute)


def band_transpose_product(
    band: Band,
    weights: BFloat16[Array, "B H I 128 W"],
    y: BFloat16[Array, "B L H D"],
    geometry: Geometry,
    interpret: Any,
) -> BFloat16[Array, "B M H D"]:
    """Σ_t weights[t, s] y[t]."""
    width = min(_WIDTH, y.shape[3])
    key_tiles = band.last.shape[1]
    shape = (geometry.rows, key_tiles * TILE, geometry.heads, y.shape[3])
    return launch(
        partial(_transpose_product_kernel, geometry=geometry, width=width),
        (band, weights, y),
        jax.ShapeDtypeStruct(shape, y.dtype),
        name="chunk_attention_band_transpose_product",
        grid={
            "n": y.shape[3] // width,
            "j": key_tiles,
            "h": geometry.heads,
            "b": geometry.rows,
        },
        scratch=[
            staged(_STAGES, _DEPTH, TILE),
            staged(_STAGES, _DEPTH, width),
            staged(2, _ROWS, width),
        ],
        stages=_STAGES,
        copies=2,
        interpret=interpret,
    )


def _score_gradient_kernel(
    pipe, band, weights, do, v, delta, out, do_s, v_s, p_s, p_full, *, geometry: Geometry
):
    row, head, tile = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("i")
    column = lax.axis_index("w")
    is_seen = column < _count(band, geometry, row, tile)
    steps = jnp.where(is_seen, v.shape[3] // _DEPTH, 0)
    keys = pl.ds(column * TILE, TILE)

    def copy():
        def copy_step(step, slot, barrier):
            part = pl.ds(step * _DEPTH, _DEPTH)
            rows = do.at[row, pl.ds(tile * TILE, TILE), head, part]
            plgpu.copy_gmem_to_smem(rows, do_s.at[slot], barrier)
            tokens = pl.ds((band.first[row, tile] + column) * TILE, TILE)
            plgpu.copy_gmem_to_smem(v.at[row, tokens, head, part], v_s.at[slot], barrier)

        pipe.fill(steps, copy_step)

    def compute(warpgroup):
        rows = pl.ds(warpgroup * _ROWS, _ROWS)
        own = p_s.at[warpgroup]

        @pl.when(is_seen)
        def _():
            place = row, head, tile, rows, keys
            plgpu.copy_gmem_to_smem(weights.at[place], own, p_full.at[warpgroup])

            def multiply(acc):
                def add(step, slot):
                    plgpu.wgmma(acc, do_s.at[slot, rows], v_s.at[slot].transpose((1, 0)))

                pipe.multiply(0, steps, add)
                return acc[...]

            gradient = pl.run_scoped(multiply, _Accumulator((_ROWS, TILE), jnp.float32))
            tokens = pl.ds(tile * TILE + warpgroup * _ROWS, _ROWS)
            mean = plgpu.load(delta.at[row, head, tokens], layout=_ROW_LAYOUT, optimized=False)
            gradient = gradient - lax.broadcast_in_dim(mean, gradient.shape, [0])
            plgpu.barrier_wait(p_full.at[warpgroup])
            values = plgpu.load(own, layout=plgpu.Layout.WGMMA, optimized=False)
            values = values.astype(jnp.float32)
            # Not even an infinite gradient counts where the weight is zero.
            gradient = jnp.where(values == 0, 0.0, values * gradient)
            store(own, out.at[place], gradient)

    by_warpgroup(copy, compute)


def score_gradient(
    band: Band,
    weights: BFloat16[Array, "B H I 128 W"],
    do: BFloat16[Array, "B L H Dv"],
    v: BFloat16[Array, "B M H Dv"],
    delta: Float[Array, "B H L"],
    geometry: Geometry,
    interpret: Any,
) -> BFloat16[Array, "B H I 128 W"]:
    """weights * (do vᵀ - delta) in the band."""
    return launch(
        partial(_score_gradient_kernel, geometry=geometry),
        (band, weights, do, v, delta),
        _band_shape(geometry),
        name="chunk_attention_score_gradient",
        grid={
            "w": geometry.width,
            "i": geometry.query_tiles,
            "h": geometry.heads,
            "b": geometry.rows,
        },
        scratch=[
            staged(_STAGES, TILE, _DEPTH),
            staged(_STAGES, TILE, _DEPTH),
            staged(2, _ROWS, TILE),
            plgpu.Barrier(num_arrivals=1, num_barriers=2),
        ],
        stages=_STAGES,
        copies=2,
        interpret=interpret,
    )
