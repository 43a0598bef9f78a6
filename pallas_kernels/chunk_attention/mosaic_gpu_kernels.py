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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.chunk_attention.mosaic_gpu_band import TILE, Band, Geometry, count_key_tiles
from pallas_kernels.chunk_attention.mosaic_gpu_pipeline import by_warpgroup, launch, staged

_ROWS = TILE // 2
# Public, but type checkers do not see it.
_Accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
_ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
_LOG2_E = math.log2(math.e)


def _scores_kernel(pipe, band, q, k, lse, results, q_s, k_s, p_s, q_full, *, geometry: Geometry):
    """Weights of a query tile; with their logsumexp unless it is given."""
    weights, new_lse = results
    row, head, tile = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("i")
    count = count_key_tiles(band, geometry, row, tile)
    passes = 1 if lse is not None else 2

    def copy():
        def copy_key(step, slot, barrier):
            tokens = pl.ds((band.first[row, tile] + lax.rem(step, count)) * TILE, TILE)
            plgpu.copy_gmem_to_smem(k.at[row, tokens, head], k_s.at[slot], barrier)

        plgpu.copy_gmem_to_smem(q.at[row, pl.ds(tile * TILE, TILE), head], q_s, q_full)
        pipe.fill(0, passes * count, copy_key)
        pipe.drain(passes * count)

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
        (jax.ShapeDtypeStruct(geometry.shape, jnp.bfloat16), shape),
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
