"""The kernel on tensor cores: a block has 8 or 16 output features, a warp a share of their columns.

The rows are the first operand of the tensor cores' 16 x 8 x 16 products and the weights the second
one: a block does not need 64 output features, as with `wgmma`, and most matrices have a block for
every multiprocessor. The warps' sums meet in shared memory.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.mosaic_gpu import store
from pallas_kernels.skinny_matmul.block_sizes import WARP_WIDTH, WARPS, TensorCoreTiling
from pallas_kernels.skinny_matmul.mosaic_gpu.fragments import (
    SUMS,
    M,
    N,
    multiply_add,
    outputs_layout,
    swap_pairs,
    tile_layout,
)
from pallas_kernels.skinny_matmul.mosaic_gpu.operands import SkinnyOperands
from pallas_kernels.skinny_matmul.types import Part, RowNorm, starts_of


class TensorCoreScratch(NamedTuple):
    """Shared memory and barriers.

    Attributes:
      steps: for every step, the block's weights of its columns: (features, columns / 32, 32) of
        every half.
      barriers: for every step, completes when its weights have arrived.
      products: (halves, WARPS * M, features), each warp's sums of x and weights.
      weights: the same with ones for x: sums of weights; None where the kernel
        needs none.
      x: (2, rows, WARPS), each warp's sums of a row of x and of its squares; None without a norm.
    """

    steps: Any
    barriers: Any
    products: Any
    weights: Any
    x: Any

    @classmethod
    def make(
        cls, operands: SkinnyOperands, tiling: TensorCoreTiling, norm: RowNorm | None
    ) -> "TensorCoreScratch":
        """Shared memory for operands whose columns are (K / 32, 32)."""
        halves = operands.halves
        rows, num_tiles = operands.x.shape[0], operands.x.shape[1] // WARPS
        steps = [
            [
                plgpu.SMEM((tiling.features, len(step) * WARPS, WARP_WIDTH), operands.values.dtype)
                for _ in range(halves)
            ]
            for step in _steps(num_tiles, tiling)
        ]
        barriers = plgpu.Barrier(num_arrivals=halves, num_barriers=len(steps))
        sums = plgpu.SMEM((halves, WARPS * M, tiling.features), jnp.float32)
        sums_weights = norm is not None and norm.kind == "layer" and operands.weight_sums is None
        of_rows = plgpu.SMEM((2, rows, WARPS), jnp.float32)
        weights = sums if sums_weights else None
        return cls(steps, barriers, sums, weights, None if norm is None else of_rows)


def _steps(num_tiles: int, tiling: TensorCoreTiling) -> list[range]:
    """The tiles of columns of every step; the last one may have fewer."""
    starts = range(0, num_tiles, tiling.tiles)
    return [range(start, min(start + tiling.tiles, num_tiles)) for start in starts]


class _Sums(NamedTuple):
    """Sums over the columns seen so far.

    Attributes:
      products: (WARPS * M, features) of every half.
      weights: the same with ones for x, or empty.
      x: (rows, WARPS, WARP_WIDTH) of x, or None.
      squares: the same of its squares, or None.
    """

    products: list[Any]
    weights: list[Any]
    x: Any
    squares: Any


class _TensorCoreKernelCall(NamedTuple):
    operands: SkinnyOperands
    scratch: TensorCoreScratch
    tiling: TensorCoreTiling
    norm: RowNorm | None
    is_interpreted: bool

    @property
    def rows(self) -> int:
        return self.operands.x.shape[0]

    @property
    def layout(self) -> Any:
        """The layout of the results, (rows, features)."""
        return outputs_layout(self.rows, self.tiling.features)

    @property
    def subtracts_mean(self) -> bool:
        return self.norm is not None and self.norm.kind == "layer"

    @property
    def sums_weights(self) -> bool:
        """Whether the kernel adds up the weights that it reads."""
        return self.scratch.weights is not None

    @property
    def first(self) -> Any:
        """The block's first output feature."""
        return lax.axis_index("n") * self.tiling.features

    def run(self) -> Any:
        """The output features of the block for every row of x, float32, in `layout`."""
        steps = _steps(self.operands.values.shape[1] // WARPS, self.tiling)
        # All weights of the block are on their way before the first product.
        for i, step in enumerate(steps):
            self.copy_weights(i, step)
        sums, x = self.zeros(), self.load_x(steps[0])
        for i, following in enumerate([*steps[1:], range(0)]):
            here, x = x, self.load_x(following)
            plgpu.barrier_wait(self.scratch.barriers.at[i])
            for j, of_tile in enumerate(here):
                sums = self.add(sums, of_tile, self.load_weights(i, j))
        self.store_sums(sums)
        return self.finish()

    def zeros(self) -> _Sums:
        products = plgpu.layout_cast(
            jnp.zeros((WARPS * M, self.tiling.features), jnp.float32), SUMS
        )
        of_rows = self.tile_of(0.0, jnp.float32)
        return _Sums(
            [products] * self.operands.halves,
            [products] * self.operands.halves if self.sums_weights else [],
            of_rows if self.subtracts_mean else None,
            None if self.norm is None else of_rows,
        )

    def tile_of(self, value: float, dtype: Any) -> Any:
        """A tile of equal numbers, of the shape of those of x."""
        tile = jnp.full((self.rows, WARPS, WARP_WIDTH), value, dtype)
        return plgpu.layout_cast(tile, tile_layout(self.rows))

    def copy_weights(self, index: int, step: range) -> None:
        columns = pl.ds(step.start * WARPS, len(step) * WARPS)
        for half, target in enumerate(self.scratch.steps[index]):
            first = self.first + self.operands.half_start(half)
            source = self.operands.values.at[pl.ds(first, self.tiling.features), columns, :]
            plgpu.copy_gmem_to_smem(source, target, self.scratch.barriers.at[index])

    def load_x(self, tiles: range) -> list[Any]:
        refs = [self.operands.x.at[:, pl.ds(tile * WARPS, WARPS), :] for tile in tiles]
        return [plgpu.load(ref, layout=tile_layout(self.rows), optimized=False) for ref in refs]

    def load_weights(self, index: int, tile: int) -> list[Any]:
        """Weights of a tile of a step by half, bfloat16."""
        columns = pl.ds(tile * WARPS, WARPS)
        refs = [half.at[:, columns, :] for half in self.scratch.steps[index]]
        loaded = [plgpu.load(ref, layout=tile_layout(N), optimized=False) for ref in refs]
        return [each.astype(jnp.bfloat16) for each in loaded]

    def add(self, sums: _Sums, x: Any, weights: Sequence[Any]) -> _Sums:
        products = [
            self.multiply_add(old, x, each)
            for old, each in zip(sums.products, weights, strict=True)
        ]
        if self.norm is None:
            return _Sums(products, [], None, None)
        x = x.astype(jnp.float32)
        squares = sums.squares + x * x
        if not self.subtracts_mean:
            return _Sums(products, [], None, squares)
        totals = []
        if self.sums_weights:
            ones = self.tile_of(1.0, jnp.bfloat16)
            totals = [
                self.multiply_add(old, ones, each)
                for old, each in zip(sums.weights, weights, strict=True)
            ]
        return _Sums(products, totals, sums.x + x, squares)

    def multiply_add(self, sums: Any, x: Any, weights: Any) -> Any:
        return multiply_add(sums, x, weights, is_interpreted=self.is_interpreted)

    def store_sums(self, sums: _Sums) -> None:
        for half, products in enumerate(sums.products):
            store(self.scratch.products.at[half], products)
        for half, totals in enumerate(sums.weights):
            store(self.scratch.weights.at[half], totals)
        for i, of_rows in enumerate([sums.x, sums.squares]):
            if of_rows is not None:
                store(self.scratch.x.at[i], of_rows.sum(axis=2))
        plgpu.commit_smem()

    def finish(self) -> Any:
        """The sums of all warps after norm and epilogue."""
        by_half = self.totals(self.scratch.products)
        if self.norm is not None:
            share = 1 / (self.operands.values.shape[1] * WARP_WIDTH)
            by_half = self.operands.apply_norm(
                self.norm,
                by_half,
                mean=self.total_of_rows(0) * share if self.subtracts_mean else None,
                mean_square=self.total_of_rows(1) * share,
                weight_sums=self.load_weight_sums(),
                across=self.across,
            )
        return self.operands.apply_epilogue(by_half, self.vector, self.load_added)

    def load_weight_sums(self) -> list[Any]:
        """Sums of weights of every half; none for other norms than LayerNorm."""
        if self.sums_weights:
            # All rows of these sums are equal.
            return self.totals(self.scratch.weights)
        ref = self.operands.weight_sums
        halves = range(0 if ref is None else self.operands.halves)
        return [self.vector(ref, self.operands.half_start(half)) for half in halves]

    def load_added(self, ref: Any) -> Any:
        ref = ref.at[:, pl.ds(self.first, self.tiling.features)]
        return plgpu.load(ref, layout=self.layout, optimized=False).astype(jnp.float32)

    def totals(self, sums: Any) -> list[Any]:
        """The warps' sums together, (rows, features) of every half."""
        return [
            _add_warps(
                [sums.at[half, pl.ds(warp * M, self.rows), :] for warp in range(WARPS)], self.layout
            )
            for half in range(self.operands.halves)
        ]

    def total_of_rows(self, index: int) -> Any:
        """The warps' sums of the rows of x together, (rows,)."""
        refs = [self.scratch.x.at[index, :, warp] for warp in range(WARPS)]
        return _add_warps(refs, self.layout.reduce(1))

    def across(self, of_rows: Any) -> Any:
        shape = (self.rows, self.tiling.features)
        return plgpu.layout_cast(lax.broadcast_in_dim(of_rows, shape, [0]), self.layout)

    def vector(self, ref: Any, offset: int = 0) -> Any:
        """The block's output features of a vector, for all rows, as float32."""
        ref = ref.at[pl.ds(self.first + offset, self.tiling.features)]
        loaded = plgpu.load(ref, layout=self.layout.reduce(0), optimized=False).astype(jnp.float32)
        shape = (self.rows, self.tiling.features)
        return plgpu.layout_cast(lax.broadcast_in_dim(loaded, shape, [1]), self.layout)


def _add_warps(refs: Sequence[Any], layout: Any) -> Any:
    first, second, third, fourth = (plgpu.load(ref, layout=layout, optimized=False) for ref in refs)
    return (first + second) + (third + fourth)


def tensor_core_kernel(
    operands: SkinnyOperands,
    results: Sequence[Any],
    scratch: TensorCoreScratch,
    *,
    tiling: TensorCoreTiling,
    norm: RowNorm | None,
    parts: Sequence[Part],
    is_interpreted: bool,
) -> None:
    """Some output features of every row of x; operands with columns as (K / 32, 32)."""
    call = _TensorCoreKernelCall(operands, scratch, tiling, norm, is_interpreted)
    y = call.run()
    for result, part, start in zip(results, parts, starts_of(parts), strict=False):
        first = call.first - start

        @pl.when((first >= 0) & (first < part.width))
        def _(result: Any = result, part: Part = part, first: Any = first):
            out = y
            if part.is_swapped:
                out = swap_pairs(y, call.layout, is_interpreted=is_interpreted)
            ref = result.at[:, pl.ds(first, tiling.features)]
            store(ref, out.astype(result.dtype))
