"""The kernel of products of a few rows: a warp has rows of the matrix, its threads their columns.

Every weight is used by few rows of x, so the products are float32 multiply-adds outside the tensor
cores, whose smallest tile has 64 output features: too few blocks to read with all multiprocessors.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.skinny_matmul.block_sizes import WARPS, WIDTH, SkinnyTiling
from pallas_kernels.skinny_matmul.types import Epilogue, Int8Matrix, Part, RowNorm, starts_of


class SkinnyOperands(NamedTuple):
    """Operands of the kernel: arrays, or references in the kernel.

    Attributes:
      x: (B, K).
      matrix: (N, K).
      norm_scale: of the norm, (K,) float32, or None.
      norm_bias: of the norm, (K,) float32, or None.
      epilogue: vectors (N,) and arrays (B, M).
    """

    x: Any
    matrix: Any
    norm_scale: Any
    norm_bias: Any
    epilogue: Epilogue


def matrix_layout(rows_per_warp: int) -> Any:
    """Rows of the matrix over warps, WIDTH columns over threads."""
    if rows_per_warp == 1:
        return row_layout(WARPS)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((WARPS * rows_per_warp, WIDTH), (rows_per_warp, WIDTH), (8,))),
        warp_dims=(-5,),
        lane_dims=(-2,),
        vector_dim=-1,
    )


def row_layout(rows: int) -> Any:
    """WIDTH columns of one row in every warp, or of four rows, one in each warp."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((rows, WIDTH), (8,))),
        warp_dims=(-3,) if rows == WARPS else (plgpu.Replicated(WARPS),),
        lane_dims=(-2,),
        vector_dim=-1,
    )


class _SkinnyKernelCall(NamedTuple):
    operands: SkinnyOperands
    normalized_smem: Any
    tiling: SkinnyTiling
    norm: RowNorm | None

    @property
    def layout(self) -> Any:
        return matrix_layout(self.tiling.rows_per_warp)

    @property
    def halves(self) -> int:
        return 2 if self.operands.epilogue.activation == "swiglu" else 1

    @property
    def first(self) -> Any:
        """The block's first output feature."""
        return lax.axis_index("n") * self.tiling.rows

    def run(self) -> list[Any]:
        """The output features of the block for every row of x, float32."""
        loaded = self.load_weights(0)
        if self.norm is not None:
            self.normalize()
            plgpu.commit_smem()
        sums = self.sum_products(loaded)
        return [self.finish(row, by_half) for row, by_half in enumerate(sums)]

    def sum_products(self, loaded: list[list[Any]]) -> list[list[Any]]:
        """Products of the block's weights with every row of x, by row and half."""
        num_rows, in_features = self.operands.x.shape
        shape, layout = (self.tiling.rows, WIDTH), self.layout
        sums: list[list[Any]] = [[None] * self.halves for _ in range(num_rows)]
        for start in range(0, in_features, self.tiling.step):
            weights, next_start = loaded, start + self.tiling.step
            # The next weights are on their way while these are used.
            loaded = self.load_weights(next_start) if next_start < in_features else []
            for i, by_half in enumerate(weights):
                column = start + i * WIDTH
                wide = [weight.astype(jnp.float32) for weight in by_half]
                for row in range(num_rows):
                    x = lax.broadcast_in_dim(self.load_x(row, column), shape, [1])
                    x = plgpu.layout_cast(x, layout)
                    for half, weight in enumerate(wide):
                        product, old = x * weight, sums[row][half]
                        sums[row][half] = product if old is None else old + product
        return [[total.sum(axis=1) for total in by_half] for by_half in sums]

    def load_weights(self, start: int) -> list[list[Any]]:
        """Weights of a step, by tile of columns and by half."""
        matrix = self.operands.matrix
        values = matrix.values if isinstance(matrix, Int8Matrix) else matrix
        out_features, in_features = values.shape
        loaded = []
        for column in range(start, min(start + self.tiling.step, in_features), WIDTH):
            rows = [
                pl.ds(self.first + half * (out_features // 2), self.tiling.rows)
                for half in range(self.halves)
            ]
            loaded.append(
                [
                    plgpu.load(
                        values.at[each, pl.ds(column, WIDTH)], layout=self.layout, optimized=False
                    )
                    for each in rows
                ]
            )
        return loaded

    def load_x(self, row: int, column: int) -> Any:
        source = self.operands.x if self.norm is None else self.normalized_smem
        ref = source.at[row, pl.ds(column, WIDTH)]
        return plgpu.load(ref, layout=self.layout.reduce(0), optimized=False).astype(jnp.float32)

    def normalize(self) -> None:
        """Stores the normalized rows of x in shared memory."""
        num_rows = self.operands.x.shape[0]
        together = WARPS if num_rows % WARPS == 0 else 1
        for row in range(0, num_rows, together):
            self.normalize_rows(row, together)

    def normalize_rows(self, first: int, together: int) -> None:
        assert self.norm is not None
        operands, layout = self.operands, row_layout(together)
        in_features = operands.x.shape[1]
        columns = range(0, in_features, WIDTH)
        shape = (together, WIDTH)

        def load(column: int) -> Any:
            ref = operands.x.at[pl.ds(first, together), pl.ds(column, WIDTH)]
            return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        def vector(ref: Any, column: int) -> Any:
            loaded = plgpu.load(
                ref.at[pl.ds(column, WIDTH)], layout=layout.reduce(0), optimized=False
            )
            return plgpu.layout_cast(lax.broadcast_in_dim(loaded, shape, [1]), layout)

        def over_columns(values: Any) -> Any:
            return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, [0]), layout)

        def mean(of: Callable[[Any], Any]) -> Any:
            total = None
            for column in columns:
                term = of(load(column))
                total = term if total is None else total + term
            assert total is not None
            return over_columns(total.sum(axis=1) * (1 / in_features))

        def center(x: Any) -> Any:
            return x

        if self.norm.kind == "layer":
            average = mean(lambda x: x)

            def center(x: Any) -> Any:
                return x - average

        factor = lax.rsqrt(mean(lambda x: center(x) * center(x)) + self.norm.eps)
        for column in columns:
            y = center(load(column)) * factor
            if operands.norm_scale is not None:
                y = y * vector(operands.norm_scale, column)
            if operands.norm_bias is not None:
                y = y + vector(operands.norm_bias, column)
            smem = self.normalized_smem.at[pl.ds(first, together), pl.ds(column, WIDTH)]
            smem[...] = y.astype(smem.dtype)

    def finish(self, row: int, sums: list[Any]) -> Any:
        """The output features of a row of x after the epilogue."""
        epilogue, matrix = self.operands.epilogue, self.operands.matrix
        offsets = [0, _num_features(matrix) // 2][: self.halves]
        for half, offset in enumerate(offsets):
            if isinstance(matrix, Int8Matrix):
                sums[half] = sums[half] * self.vector(matrix.scale, offset)
            if epilogue.bias is not None:
                sums[half] = sums[half] + self.vector(epilogue.bias, offset)
        y = sums[0]
        if epilogue.activation is not None:
            y = y / (1 + jnp.exp(-y))
        if epilogue.activation == "swiglu":
            y = y * sums[1]
        if epilogue.scale is not None:
            y = y * self.vector(epilogue.scale)
        for added in epilogue.added:
            y = y + self.vector(added.at[row])
        return y

    def vector(self, ref: Any, offset: int = 0) -> Any:
        """The block's output features of a vector, as float32."""
        ref = ref.at[pl.ds(self.first + offset, self.tiling.rows)]
        return plgpu.load(ref, layout=self.layout.reduce(1), optimized=False).astype(jnp.float32)


def _num_features(matrix: Any) -> int:
    return (matrix.values if isinstance(matrix, Int8Matrix) else matrix).shape[0]


def skinny_kernel(
    operands: SkinnyOperands,
    results: Sequence[Any],
    scratch: tuple[Any, Any],
    *,
    tiling: SkinnyTiling,
    norm: RowNorm | None,
    parts: Sequence[Part],
) -> None:
    """Some output features of every row of x."""
    outputs_smem, normalized_smem = scratch
    call = _SkinnyKernelCall(operands, normalized_smem, tiling, norm)
    for row, output in enumerate(call.run()):
        outputs_smem[row] = output
    plgpu.commit_smem()
    for result, part, start in zip(results, parts, starts_of(parts), strict=False):
        _store(result, outputs_smem, call.first - start, part)


def _store(result: Any, outputs_smem: Any, first: Any, part: Part) -> None:
    """Stores the outputs if their features are those of this part, one number at a time.

    A few adjacent numbers are less than the 32 bytes of which stores of arrays are made.
    """
    num_rows, features = outputs_smem.shape

    @pl.when((first >= 0) & (first < part.width))
    def _():
        for row in range(num_rows):
            for i in range(features):
                column = first + (i ^ 1 if part.is_swapped else i)
                result[row, column] = outputs_smem[row, i].astype(result.dtype)
