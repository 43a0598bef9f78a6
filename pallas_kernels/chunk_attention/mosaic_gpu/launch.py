"""Launches of the Hopper kernels: grids, results and shared memory."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels.chunk_attention.mosaic_gpu.band import (
    TILE,
    AttentionGeometry,
    Band,
    BandTiles,
    TilePairs,
)
from pallas_kernels.chunk_attention.mosaic_gpu.pipeline import (
    NUM_WARPGROUPS,
    WARPGROUP_ROWS,
    num_persistent_blocks,
    pipeline_barriers,
    wgmma_smem,
)
from pallas_kernels.chunk_attention.mosaic_gpu.products import (
    DEPTH,
    KEY_TILES,
    MAX_WIDTH,
    STORE_WIDTH,
    GradientOperands,
    GradientScratch,
    ProductOperands,
    ProductScratch,
    count_gradient_items,
    product_kernel,
    score_gradient_kernel,
)
from pallas_kernels.chunk_attention.mosaic_gpu.weights import (
    MAX_LOG2_SUM,
    SCORES_SHAPE,
    RepairOperands,
    RepairResults,
    RepairScratch,
    WeightsOperands,
    WeightsResults,
    WeightsScratch,
    repair_kernel,
    weights_kernel,
)
from pallas_kernels.common.mosaic_gpu import launch

_WEIGHTS_STAGES, _PRODUCT_STAGES = 2, 4
_launch = partial(launch, num_warpgroups=NUM_WARPGROUPS, approx_math=True)


class UnnormalizedWeights(NamedTuple):
    """Weights in the band that are not divided by their sums yet.

    Attributes:
      weights: exp2 of the scores; of the query tiles without repair.
      repaired_weights: of the other query tiles; undefined elsewhere.
      is_repaired: 1 for query tiles whose weights are in `repaired_weights`.
      scale: the factor for every query that makes its weights sum to 1; 0 without keys.
      lse: base-2 logarithm of the sum of exp2 of every query's scores; 0 without keys.
    """

    weights: BFloat16[Array, "B H I 128 W"]
    repaired_weights: BFloat16[Array, "B H I 128 W"]
    is_repaired: Int32[Array, "B H I"]
    scale: Float[Array, "B H L"]
    lse: Float[Array, "B H L"]


def make_unnormalized_weights(
    band: Band,
    q: BFloat16[Array, "B L H Dk"],
    k: BFloat16[Array, "B M H Dk"],
    geometry: AttentionGeometry,
    interpret: Any,
) -> UnnormalizedWeights:
    """Weights of the forward pass: exp2 of scores, with sums, and repairs where they overflow."""
    weights, sums = _launch_weights(band, q, k, None, geometry, interpret)
    num_rows, heads, tiles = geometry.band_shape[:3]
    num_key_tiles = jnp.arange(tiles) + geometry.key_tile_offset + 1 - band.first_key_tile
    is_computed = jnp.arange(geometry.max_key_tiles) < num_key_tiles[..., None]
    total = jnp.where(is_computed[:, None, :, :, None], sums, 0).sum(axis=3)
    own_key = geometry.key_tile_offset * TILE + jnp.arange(tiles * TILE, dtype=jnp.int32)
    has_keys = (band.starts <= own_key).reshape(num_rows, 1, tiles, TILE)
    lse = jnp.where(has_keys, jnp.log2(total), 0.0)
    scale = jnp.where(has_keys, 1 / total, 0.0)
    # Negated, so that NaN needs repair as well.
    needs_repair = jnp.logical_not(jnp.abs(lse) <= MAX_LOG2_SUM).any(axis=3).astype(jnp.int32)
    lse, scale = (a.reshape(num_rows, heads, tiles * TILE) for a in (lse, scale))
    operands = RepairOperands(band, needs_repair, q, k, scale, lse)
    repaired = _launch_repair(operands, geometry, interpret)
    return UnnormalizedWeights(
        weights, repaired.weights, needs_repair, repaired.scale, repaired.lse
    )


def recompute_weights(
    band: Band,
    q: BFloat16[Array, "B L H Dk"],
    k: BFloat16[Array, "B M H Dk"],
    lse: Float[Array, "B H L"],
    geometry: AttentionGeometry,
    interpret: Any,
) -> BFloat16[Array, "B H I 128 W"]:
    """Softmax weights in the band from the base-2 `lse` of the scores, for the backward pass.

    Columns of a query tile count from its first key tile; key tiles that it does not see are
    undefined.
    """
    return _launch_weights(band, q, k, lse, geometry, interpret).weights


def _launch_weights(band, q, k, lse, geometry: AttentionGeometry, interpret) -> WeightsResults:
    sums = None
    if lse is None:
        sums = jax.ShapeDtypeStruct(
            (*geometry.band_shape[:3], geometry.max_key_tiles, TILE), jnp.float32
        )
    num_blocks = num_persistent_blocks(math.prod(BandTiles(geometry, 1).sizes), interpret)
    return _launch(
        partial(weights_kernel, geometry=geometry, num_blocks=num_blocks),
        WeightsOperands(band, q, k, lse),
        WeightsResults(jax.ShapeDtypeStruct(geometry.band_shape, jnp.bfloat16), sums),
        name="chunk_attention_weights",
        grid={"block": num_blocks},
        scratch=WeightsScratch(
            q_smem=wgmma_smem(TILE, q.shape[3]),
            k_smem=wgmma_smem(_WEIGHTS_STAGES, TILE, q.shape[3]),
            weights_smem=wgmma_smem(2, *SCORES_SHAPE),
            q_full_barrier=plgpu.Barrier(num_arrivals=1),
            q_consumed_barrier=plgpu.Barrier(num_arrivals=2),
            pipeline=pipeline_barriers(_WEIGHTS_STAGES, copies=1),
        ),
        interpret=interpret,
    )


def _launch_repair(
    operands: RepairOperands, geometry: AttentionGeometry, interpret: Any
) -> RepairResults:
    key_width = operands.q.shape[3]
    return _launch(
        partial(repair_kernel, geometry=geometry),
        operands,
        RepairResults(
            jax.ShapeDtypeStruct(geometry.band_shape, jnp.bfloat16),
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (operands.scale, operands.lse)),
        ),
        name="chunk_attention_repair",
        grid={"i": geometry.query_tiles, "h": geometry.heads, "b": geometry.num_rows},
        scratch=RepairScratch(
            q_smem=wgmma_smem(TILE, key_width),
            k_smem=wgmma_smem(_WEIGHTS_STAGES, TILE, key_width),
            weights_smem=wgmma_smem(2, *SCORES_SHAPE),
            q_full_barrier=plgpu.Barrier(num_arrivals=1),
            pipeline=pipeline_barriers(_WEIGHTS_STAGES, copies=1),
        ),
        interpret=interpret,
    )


def band_product(
    band: Band,
    weights: BFloat16[Array, "B H I 128 W"],
    x: BFloat16[Array, "B N H D"],
    scale: Float[Array, "B H L"] | None,
    geometry: AttentionGeometry,
    interpret: Any,
    *,
    is_transposed: bool = False,
    repaired: tuple[BFloat16[Array, "B H I 128 W"], Int32[Array, "B H I"]] | None = None,
) -> BFloat16[Array, "B N H D"]:
    """scale[t] · Σ_s weights[t, s] x[s] for every query t; transposed, Σ_t weights[t, s] x[t].

    Args:
      band: the band.
      weights: a number for every score in the band.
      x: keys or values; queries or their gradients if transposed.
      scale: factor for every query; None: 1.
      geometry: static sizes.
      interpret: from `interpret_params`.
      is_transposed: whether to sum over queries.
      repaired: (other weights, 1 for query tiles that take those); not if transposed.
    """
    width = min(MAX_WIDTH, x.shape[3])
    num_tiles = geometry.key_tiles if is_transposed else geometry.query_tiles
    pairs = TilePairs(num_tiles, geometry.tiles_per_chunk)
    row_items = pairs.num_chunks * pairs.pairs_per_chunk * (x.shape[3] // width)
    items = geometry.num_rows * geometry.heads * row_items
    num_blocks = num_persistent_blocks(items, interpret)
    weights_tile = (DEPTH, TILE) if is_transposed else (TILE, DEPTH)
    return _launch(
        partial(
            product_kernel, geometry=geometry, num_blocks=num_blocks, is_transposed=is_transposed
        ),
        ProductOperands(band, weights, repaired, x, scale),
        jax.ShapeDtypeStruct((geometry.num_rows, num_tiles * TILE, *x.shape[2:]), x.dtype),
        name="chunk_attention_band_" + ("transpose_product" if is_transposed else "product"),
        grid={"block": num_blocks},
        scratch=ProductScratch(
            weights_smem=wgmma_smem(_PRODUCT_STAGES, *weights_tile),
            x_smem=wgmma_smem(_PRODUCT_STAGES, DEPTH, width),
            out_smem=wgmma_smem(2, 2, WARPGROUP_ROWS, STORE_WIDTH),
            pipeline=pipeline_barriers(_PRODUCT_STAGES, copies=2),
        ),
        interpret=interpret,
    )


def score_gradient(
    band: Band,
    weights: BFloat16[Array, "B H I 128 W"],
    do: BFloat16[Array, "B L H Dv"],
    v: BFloat16[Array, "B M H Dv"],
    delta: Float[Array, "B H L"],
    geometry: AttentionGeometry,
    interpret: Any,
) -> BFloat16[Array, "B H I 128 W"]:
    """dS = weights * (do vᵀ - delta) in the band; delta is every query's sum of do * out."""
    num_blocks = num_persistent_blocks(count_gradient_items(geometry), interpret)
    return _launch(
        partial(score_gradient_kernel, geometry=geometry, num_blocks=num_blocks),
        GradientOperands(band, weights, do, v, delta),
        jax.ShapeDtypeStruct(geometry.band_shape, weights.dtype),
        name="chunk_attention_score_gradient",
        grid={"block": num_blocks},
        scratch=GradientScratch(
            do_smem=wgmma_smem(_PRODUCT_STAGES, TILE, DEPTH),
            v_smem=wgmma_smem(_PRODUCT_STAGES, KEY_TILES * TILE, DEPTH),
            out_smem=wgmma_smem(2, 2, WARPGROUP_ROWS, STORE_WIDTH),
            pipeline=pipeline_barriers(_PRODUCT_STAGES, copies=1 + KEY_TILES),
        ),
        interpret=interpret,
    )
