"""The kernel of 17 to 64 rows: `wgmma` with the rows as its first operand, columns over a cluster.

Every block reads all rows of its columns. With few output features a block these would be most of
what it reads: blocks have many output features, and the blocks of a cluster a share of the columns
each. Their sums meet in each other's shared memory, where every block finishes a share of the rows.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.mosaic_gpu import cluster_arrive, cluster_wait, store
from pallas_kernels.skinny_matmul.block_sizes import CLUSTER_AXIS, WideTiling
from pallas_kernels.skinny_matmul.mosaic_gpu.fragments import swap_pairs, vectors_layout
from pallas_kernels.skinny_matmul.mosaic_gpu.operands import SkinnyOperands
from pallas_kernels.skinny_matmul.mosaic_gpu.wide_products import (
    RowSums,
    WideProducts,
    WideScratch,
)
from pallas_kernels.skinny_matmul.types import Int8Matrix, Part, RowNorm, starts_of


class _WideKernelCall(NamedTuple):
    products: WideProducts

    @property
    def operands(self) -> SkinnyOperands:
        return self.products.operands

    @property
    def scratch(self) -> WideScratch:
        return self.products.scratch

    @property
    def tiling(self) -> WideTiling:
        return self.products.tiling

    @property
    def rows(self) -> int:
        """Rows that a block finishes."""
        return self.operands.x.shape[0] // self.tiling.splits

    @property
    def layout(self) -> Any:
        """The layout of results (rows, columns)."""
        return vectors_layout(self.rows, self.tiling.columns)

    @property
    def splits(self) -> Iterable[Any]:
        """The shares of columns and rows of this block: one, or in the interpreter all."""
        if self.products.is_interpreted:
            return range(self.tiling.splits)
        return [lax.axis_index(CLUSTER_AXIS) if self.tiling.splits > 1 else 0]

    def run(self, write: Callable[[Any, Any, Any], None]) -> None:
        """Computes the block's output features; `write(row, column, y)` for every tile of them.

        A tile y is float32 in `layout`; its first row and first output feature are given.
        """
        for split in self.splits:
            self.products.multiply(split)
        plgpu.commit_smem()
        if self.has_cluster:
            cluster_arrive()
        tiles = [
            (split, column)
            for split in self.splits
            for column in range(0, self.tiling.features, self.tiling.columns)
        ]
        # On their way while the other blocks are waited for.
        loaded = [self.load_epilogue(*tile) for tile in tiles]
        if self.has_cluster:
            cluster_wait()
        sums = [self.load_sums(*tile) for tile in tiles]
        if self.has_cluster:
            cluster_arrive()
        for (split, column), of_tile, operands in zip(tiles, sums, loaded, strict=True):
            write(split * self.rows, self.products.first + column, self.finish(of_tile, operands))
        if self.has_cluster:
            # The others may still read the sums of this block.
            cluster_wait()

    @property
    def has_cluster(self) -> bool:
        return self.tiling.splits > 1 and not self.products.is_interpreted

    def load_sums(self, split: Any, column: int) -> tuple[list[Any], RowSums]:
        """All blocks' sums together: (rows, columns) of every half, and of the rows of x."""
        rows = pl.ds(split * self.rows, self.rows)
        by_half = [
            self.add_blocks(
                self.scratch.products,
                (rows, pl.ds(half * self.tiling.features + column, self.tiling.columns)),
                self.layout,
            )
            for half in range(self.operands.halves)
        ]
        of_rows = [
            self.add_blocks(self.scratch.x_sums, (i, rows), self.layout.reduce(1))
            if is_used
            else None
            for i, is_used in enumerate(
                [self.products.subtracts_mean, self.products.norm is not None]
            )
        ]
        return by_half, RowSums(*of_rows)

    def add_blocks(self, ref: Any, index: tuple[Any, ...], layout: Any) -> Any:
        total = None
        for block in range(self.tiling.splits):
            if self.has_cluster:
                sums = plgpu.cluster_ref(ref.at[(0, *index)], {CLUSTER_AXIS: block})
            else:
                sums = ref.at[(block, *index)]
            loaded = plgpu.load(sums, layout=layout, optimized=False)
            total = loaded if total is None else total + loaded
        return total

    def load_epilogue(self, split: Any, column: int) -> SkinnyOperands:
        """The operands with what follows the product as a tile of float32 numbers.

        Vectors are a tile for each offset that `apply_epilogue` asks for.
        """
        epilogue, matrix = self.operands.epilogue, self.operands.matrix
        offsets = [self.operands.half_start(half) for half in range(self.operands.halves)]
        columns, rows = self.tiling.columns, pl.ds(split * self.rows, self.rows)
        first = self.products.first + column

        def load(ref: Any, layout: Any) -> Any:
            return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        def vector(ref: Any, offset: int) -> Any:
            loaded = load(ref.at[pl.ds(first + offset, columns)], self.layout.reduce(0))
            return self.broadcast(loaded, 1)

        def by_half(ref: Any) -> Any:
            return None if ref is None else {offset: vector(ref, offset) for offset in offsets}

        if isinstance(matrix, Int8Matrix):
            matrix = matrix._replace(scale=by_half(matrix.scale))
        return SkinnyOperands(
            self.operands.x,
            matrix,
            epilogue._replace(
                bias=by_half(epilogue.bias),
                scale=None if epilogue.scale is None else {0: vector(epilogue.scale, 0)},
                added=[
                    load(each.at[rows, pl.ds(first, columns)], self.layout)
                    for each in epilogue.added
                ],
            ),
            by_half(self.operands.weight_sums),
        )

    def finish(self, sums: tuple[list[Any], RowSums], loaded: SkinnyOperands) -> Any:
        """The output features of a tile after norm and epilogue."""
        by_half, row_sums = sums
        if self.products.norm is not None:
            share = 1 / self.operands.values.shape[1]
            by_half = loaded.apply_norm(
                self.products.norm,
                by_half,
                mean=row_sums.x * share if self.products.subtracts_mean else None,
                mean_square=row_sums.squares * share,
                weight_sums=list(loaded.weight_sums.values())
                if self.products.subtracts_mean
                else [],
                across=lambda of_rows: self.broadcast(of_rows, 0),
            )
        return loaded.apply_epilogue(
            by_half, lambda vector, offset=0: vector[offset], lambda added: added
        )

    def broadcast(self, values: Any, dimension: int) -> Any:
        shape = (self.rows, self.tiling.columns)
        return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, [dimension]), self.layout)


def wide_kernel(
    operands: SkinnyOperands,
    results: Sequence[Any],
    scratch: WideScratch,
    *,
    tiling: WideTiling,
    norm: RowNorm | None,
    parts: Sequence[Part],
    is_interpreted: bool,
) -> None:
    """Some output features of every row of x."""
    call = _WideKernelCall(WideProducts(operands, scratch, tiling, norm, is_interpreted))

    def write(row: Any, column: Any, y: Any) -> None:
        for result, part, start in zip(results, parts, starts_of(parts), strict=False):
            first = column - start

            @pl.when((first >= 0) & (first < part.width))
            def _(result: Any = result, part: Part = part, first: Any = first):
                out = y
                if part.is_swapped:
                    out = swap_pairs(y, call.layout, is_interpreted=is_interpreted)
                ref = result.at[pl.ds(row, call.rows), pl.ds(first, tiling.columns)]
                store(ref, out.astype(result.dtype))

    call.run(write)
