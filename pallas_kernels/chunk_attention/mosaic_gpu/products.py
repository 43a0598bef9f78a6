"""Kernels of matrix products over the band: O = P V, dQ = dS K, dV = Pᵀ dO, dK = dSᵀ Q, and dS.

Blocks are persistent: each takes one work item after the other, and while the consumer warpgroups
round and write a tile, the producer warpgroup already copies operands of the next one.
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
    TilePairs,
    count_key_tiles,
    first_key_tile,
    last_query_tile,
    unravel,
)
from pallas_kernels.chunk_attention.mosaic_gpu.pipeline import (
    WARPGROUP_ROWS,
    Accumulator,
    Pipeline,
    load_row_values,
    warp_specialize,
)

# Terms of a contraction in one step, and columns of an output tile at most.
DEPTH, MAX_WIDTH = 64, 256
# Columns of the output that one copy to global memory writes.
STORE_WIDTH = 64
# Key tiles of one work item of the score gradient.
KEY_TILES = 2


def _work_item(iteration: Any, num_blocks: int) -> Any:
    """The block's work item of an iteration.

    The shift by 37 spreads work items of unequal size over the blocks.
    """
    return iteration * num_blocks + lax.rem(lax.axis_index("block") + 37 * iteration, num_blocks)


def _store(value: Any, smem: Any, gmem: Any, max_pending: int) -> None:
    """Rounds a (64, 64) tile and writes it through one of two buffers, asynchronously.

    Args:
      value: the tile, in registers.
      smem: buffer of the warpgroup.
      gmem: where to.
      max_pending: copies that may still read their buffers: 1 if the previous copy used the other
        buffer, 0 if it may have used this one.
    """
    plgpu.wait_smem_to_gmem(max_pending, wait_read_only=True)
    smem[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)


class ProductOperands(NamedTuple):
    """Operands of `product_kernel`; `repaired` (weights, is_repaired) and `scale` may be None."""

    band: Band
    weights: Any
    repaired: tuple[Any, Any] | None
    x: Any
    scale: Any


class ProductScratch(NamedTuple):
    """Shared memory and barriers of `product_kernel`."""

    weights_smem: Any
    x_smem: Any
    out_smem: Any
    pipeline: Pipeline


class _ProductItem(NamedTuple):
    """One output tile: where it is, the first tile that it sums over, and the steps of the sum."""

    row: Any
    head: Any
    tile: Any
    columns: Any
    first: Any
    num_steps: Any
    is_valid: Any


class _ProductKernelCall(NamedTuple):
    operands: ProductOperands
    out: Any
    scratch: ProductScratch
    geometry: AttentionGeometry
    num_blocks: int
    is_transposed: bool

    @property
    def width(self) -> int:
        return self.scratch.x_smem.shape[2]

    @property
    def pairs(self) -> TilePairs:
        return TilePairs(self.out.shape[1] // TILE, self.geometry.tiles_per_chunk)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows, heads, chunks of a row, pairs of a chunk, output tiles side by side."""
        geometry, pairs, columns = self.geometry, self.pairs, self.out.shape[3] // self.width
        return geometry.num_rows, geometry.heads, pairs.num_chunks, pairs.pairs_per_chunk, columns

    @property
    def num_iterations(self) -> int:
        """Iterations of a block's loop: two for every work item, which is a pair of tiles."""
        return 2 * -(-math.prod(self.sizes) // self.num_blocks)

    def locate(self, iteration: Any) -> _ProductItem:
        band, geometry = self.operands.band, self.geometry
        num_items = math.prod(self.sizes)
        item = _work_item(lax.div(iteration, 2), self.num_blocks)
        row, head, chunk, pair, column = unravel(jnp.minimum(item, num_items - 1), self.sizes)
        tile, is_valid = self.pairs.tile(chunk, pair, lax.rem(iteration, 2) == 1)
        is_valid = is_valid & (item < num_items)
        if self.is_transposed:
            first = jnp.maximum(tile - geometry.key_tile_offset, 0)
            num_tiles = jnp.maximum(last_query_tile(band, geometry, row, tile) + 1 - first, 0)
        else:
            first = first_key_tile(band, geometry, row, tile)
            num_tiles = count_key_tiles(band, geometry, row, tile)
        num_steps = jnp.where(is_valid, num_tiles * (TILE // DEPTH), 0)
        columns = pl.ds(column * self.width, self.width)
        return _ProductItem(row, head, tile, columns, first, num_steps, is_valid)

    def produce(self):
        repaired, pipeline = self.operands.repaired, self.scratch.pipeline

        def produce_tile(iteration, steps_done):
            item = self.locate(iteration)
            is_repaired = None
            if repaired is not None:
                is_repaired = repaired[1][item.row, item.head, item.tile] != 0
            pipeline.produce(
                steps_done, item.num_steps, partial(self._copy_step, item, is_repaired)
            )
            return steps_done + item.num_steps

        pipeline.producer_tail(lax.fori_loop(0, self.num_iterations, produce_tile, 0))

    def _copy_step(self, item, is_repaired, step, stage, barrier):
        _, weights, repaired, x, _ = self.operands
        scratch = self.scratch
        index = self._weights_index(item, step)

        def copy_weights(source):
            plgpu.copy_gmem_to_smem(source.at[index], scratch.weights_smem.at[stage], barrier)

        if repaired is None:
            copy_weights(weights)
        else:
            pl.when(is_repaired)(lambda: copy_weights(repaired[0]))
            pl.when(jnp.logical_not(is_repaired))(lambda: copy_weights(weights))
        tokens = pl.ds(item.first * TILE + step * DEPTH, DEPTH)
        x_gmem = x.at[item.row, tokens, item.head, item.columns]
        plgpu.copy_gmem_to_smem(x_gmem, scratch.x_smem.at[stage], barrier)

    def _weights_index(self, item, step):
        if not self.is_transposed:
            return item.row, item.head, item.tile, slice(None), pl.ds(step * DEPTH, DEPTH)
        steps_per_tile = TILE // DEPTH
        query_tile = item.first + lax.div(step, steps_per_tile)
        query = lax.rem(step, steps_per_tile) * DEPTH
        first = first_key_tile(self.operands.band, self.geometry, item.row, query_tile)
        keys = pl.ds((item.tile - first) * TILE, TILE)
        return item.row, item.head, query_tile, pl.ds(query, DEPTH), keys

    def consume(self, warpgroup):
        rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def consume_tile(iteration, steps_done):
            item = self.locate(iteration)
            tokens = pl.ds(item.tile * TILE + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            write = partial(self._write_tile, item, warpgroup, rows, tokens, steps_done)
            pl.when(item.is_valid)(write)
            return steps_done + item.num_steps

        lax.fori_loop(0, self.num_iterations, consume_tile, 0)
        plgpu.wait_smem_to_gmem(0)

    def _write_tile(self, item, warpgroup, rows, tokens, steps_done):
        weights_smem, x_smem, out_smem, pipeline = self.scratch
        scale = self.operands.scale
        row_scale = None
        if scale is not None:
            row_scale = load_row_values(scale.at[item.row, item.head, tokens])

        def accumulate(acc):
            def multiply(stage):
                if self.is_transposed:
                    a = weights_smem.at[stage, :, rows].transpose((1, 0))
                else:
                    a = weights_smem.at[stage, rows]
                plgpu.wgmma(acc, a, x_smem.at[stage])

            pipeline.consume(steps_done, item.num_steps, multiply)
            return acc[...]

        acc_type = Accumulator((WARPGROUP_ROWS, self.width), jnp.float32)
        total = pl.run_scoped(accumulate, acc_type)
        if row_scale is not None:
            total = total * lax.broadcast_in_dim(row_scale, total.shape, [0])
        # An odd number of copies ends and begins with the same buffer.
        max_pending = 1 - self.width // STORE_WIDTH % 2
        for i, start in enumerate(range(0, self.width, STORE_WIDTH)):
            out_gmem = self.out.at[item.row, tokens, item.head, item.columns]
            out_gmem = out_gmem.at[:, pl.ds(start, STORE_WIDTH)]
            value = total[:, start : start + STORE_WIDTH]
            _store(value, out_smem.at[warpgroup, i % 2], out_gmem, max_pending)


def product_kernel(
    operands: ProductOperands,
    out: Any,
    scratch: ProductScratch,
    *,
    geometry: AttentionGeometry,
    num_blocks: int,
    is_transposed: bool,
) -> None:
    """Products of the band, or of its transpose, with x."""
    call = _ProductKernelCall(operands, out, scratch, geometry, num_blocks, is_transposed)
    warp_specialize(call.produce, call.consume)


class GradientOperands(NamedTuple):
    """Operands of `score_gradient_kernel`."""

    band: Band
    weights: Any
    do: Any
    v: Any
    delta: Any


class GradientScratch(NamedTuple):
    """Shared memory and barriers of `score_gradient_kernel`; weights pass through `v_smem` too."""

    do_smem: Any
    v_smem: Any
    out_smem: Any
    pipeline: Pipeline


def count_gradient_items(geometry: AttentionGeometry) -> int:
    """Work items of `score_gradient_kernel`, invalid ones included."""
    *pairs, groups = BandTiles(geometry, KEY_TILES).sizes
    return math.prod(pairs) * (groups + 2)


def _locate_gradient(
    band: Band, geometry: AttentionGeometry, item: Any
) -> tuple[BandTile, Any, Any]:
    """A work item's first tile, whether it has two key tiles, and whether it has any.

    Items with two key tiles come first, then the last key tile of query tiles with an odd number.
    """
    tiles = BandTiles(geometry, KEY_TILES)
    num_doubles, sizes = math.prod(tiles.sizes), (*tiles.sizes[:-1], 2)
    num_singles = math.prod(sizes)
    is_double = item < num_doubles
    index = jnp.clip(item - num_doubles, 0, num_singles - 1)
    row, head, chunk, pair, second = unravel(index, sizes)
    tile, is_valid = tiles.pairs.tile(chunk, pair, second == 1)
    count = count_key_tiles(band, geometry, row, tile)
    is_odd = lax.rem(count, KEY_TILES) == 1
    is_valid = is_valid & is_odd & (item < num_doubles + num_singles)
    single = *BandTile(row, head, tile, count - 1), is_valid
    double_tile, double_is_valid = tiles.locate(band, item)
    double = *double_tile, double_is_valid
    *tile, is_valid = (jnp.where(is_double, a, b) for a, b in zip(double, single, strict=True))
    return BandTile(*tile), is_double, is_valid


class _GradientKernelCall(NamedTuple):
    operands: GradientOperands
    out: Any
    scratch: GradientScratch
    geometry: AttentionGeometry
    num_blocks: int

    @property
    def depth_steps(self) -> int:
        return self.operands.v.shape[3] // DEPTH

    @property
    def num_iterations(self) -> int:
        return -(-count_gradient_items(self.geometry) // self.num_blocks)

    def locate(self, iteration: Any) -> tuple[BandTile, Any]:
        """An iteration's first tile, and its number of key tiles: 0, 1 or 2."""
        item = _work_item(iteration, self.num_blocks)
        tile, is_double, is_valid = _locate_gradient(self.operands.band, self.geometry, item)
        return tile, jnp.where(is_valid & is_double, KEY_TILES, is_valid.astype(jnp.int32))

    def produce(self):
        pipeline = self.scratch.pipeline

        def produce_item(iteration, steps_done):
            tile, key_tiles = self.locate(iteration)
            first = first_key_tile(self.operands.band, self.geometry, tile.row, tile.query_tile)
            first_key = (first + tile.column) * TILE
            steps = jnp.where(key_tiles > 0, self.depth_steps, 0)
            copy_step = partial(self._copy_step, tile, first_key, key_tiles)
            pipeline.produce(steps_done, steps, copy_step)
            pipeline.produce(steps_done + steps, key_tiles, partial(self._copy_weights, tile))
            return steps_done + steps + key_tiles

        pipeline.producer_tail(lax.fori_loop(0, self.num_iterations, produce_item, 0))

    def _copy_step(self, tile, first_key, key_tiles, step, stage, barrier):
        _, _, do, v, _ = self.operands
        channels = pl.ds(step * DEPTH, DEPTH)
        queries = pl.ds(tile.query_tile * TILE, TILE)
        do_gmem = do.at[tile.row, queries, tile.head, channels]
        plgpu.copy_gmem_to_smem(do_gmem, self.scratch.do_smem.at[stage], barrier)

        def copy_values(i):
            rows = pl.ds(i * TILE, TILE)
            v_gmem = v.at[tile.row, pl.ds(first_key + i * TILE, TILE), tile.head, channels]
            plgpu.copy_gmem_to_smem(v_gmem, self.scratch.v_smem.at[stage, rows], barrier)

        copy_values(0)
        pl.when(key_tiles == KEY_TILES)(lambda: copy_values(1))
        # The barrier expects as many arrivals from an item with one key tile.
        pl.when(key_tiles < KEY_TILES)(lambda: plgpu.barrier_arrive(barrier))

    def _copy_weights(self, tile, i, stage, barrier):
        row, head, query_tile, column = tile
        for half in range(TILE // STORE_WIDTH):
            columns = pl.ds((column + i) * TILE + half * STORE_WIDTH, STORE_WIDTH)
            weights_gmem = self.operands.weights.at[row, head, query_tile, :, columns]
            smem = self.scratch.v_smem.at[stage, pl.ds(half * TILE, TILE)]
            plgpu.copy_gmem_to_smem(weights_gmem, smem, barrier)
        plgpu.barrier_arrive(barrier)

    def consume(self, warpgroup):
        rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def consume_item(iteration, steps_done):
            tile, key_tiles = self.locate(iteration)
            for count in (KEY_TILES, 1):
                write = partial(self._write_tiles, tile, count, warpgroup, rows, steps_done)
                pl.when(key_tiles == count)(write)
            return steps_done + jnp.where(key_tiles > 0, self.depth_steps, 0) + key_tiles

        lax.fori_loop(0, self.num_iterations, consume_item, 0)
        plgpu.wait_smem_to_gmem(0)

    def _write_tiles(self, tile, key_tiles, warpgroup, rows, steps_done):
        """Score gradients of a warpgroup's queries and `key_tiles` key tiles."""
        do_smem, v_smem, _, pipeline = self.scratch
        tokens = pl.ds(tile.query_tile * TILE + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        delta = load_row_values(self.operands.delta.at[tile.row, tile.head, tokens])

        def accumulate(acc):
            def multiply(stage):
                values = v_smem.at[stage, pl.ds(0, key_tiles * TILE)].transpose((1, 0))
                plgpu.wgmma(acc, do_smem.at[stage, rows], values)

            pipeline.consume(steps_done, self.depth_steps, multiply)
            return acc[...]

        acc_type = Accumulator((WARPGROUP_ROWS, key_tiles * TILE), jnp.float32)
        gradient = pl.run_scoped(accumulate, acc_type)
        gradient = gradient - lax.broadcast_in_dim(delta, gradient.shape, [0])
        for i in range(key_tiles):
            stage = lax.rem(steps_done + self.depth_steps + i, pipeline.num_stages)
            plgpu.barrier_wait(pipeline.full_barrier.at[stage])
            for half in range(TILE // STORE_WIDTH):
                start = i * TILE + half * STORE_WIDTH
                weights_rows = pl.ds(half * TILE + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
                self._write_half(
                    tile,
                    warpgroup,
                    rows,
                    weights_smem=v_smem.at[stage, weights_rows],
                    gradient=gradient,
                    start=start,
                    half=half,
                )
            plgpu.barrier_arrive(pipeline.consumed_barrier.at[stage])

    def _write_half(self, tile, warpgroup, rows, *, weights_smem, gradient, start, half):
        weights = plgpu.load(weights_smem, layout=plgpu.Layout.WGMMA, optimized=False)
        weights = weights.astype(jnp.float32)
        gradient = gradient[:, start : start + STORE_WIDTH]
        # A selection, because 0 times an infinite gradient is NaN.
        gradient = jnp.where(weights == 0, 0.0, weights * gradient)
        row, head, query_tile, column = tile
        columns = pl.ds(column * TILE + start, STORE_WIDTH)
        out_gmem = self.out.at[row, head, query_tile, rows, columns]
        _store(gradient, self.scratch.out_smem.at[warpgroup, half], out_gmem, 1)


def score_gradient_kernel(
    operands: GradientOperands,
    out: Any,
    scratch: GradientScratch,
    *,
    geometry: AttentionGeometry,
    num_blocks: int,
) -> None:
    """weights * (do vᵀ - delta) in the band."""
    call = _GradientKernelCall(operands, out, scratch, geometry, num_blocks)
    warp_specialize(call.produce, call.consume)
