"""The kernel of products of a few rows: a warp has rows of the matrix, its threads their columns.

Every weight is used by few rows of x: the products are float32 multiply-adds, without tensor cores.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.skinny_matmul.block_sizes import (
    MAX_LOADED_AHEAD,
    WARPS,
    WIDTH,
    SkinnyTiling,
)
from pallas_kernels.skinny_matmul.mosaic_gpu.operands import SkinnyOperands
from pallas_kernels.skinny_matmul.types import Part, RowNorm, starts_of


def matrix_layout(rows_per_warp: int) -> Any:
    """Rows of the matrix over warps, WIDTH columns over threads."""
    rows = WARPS * rows_per_warp
    tiles = ((rows, WIDTH), (8,)) if rows_per_warp == 1 else (
        (rows, WIDTH), (rows_per_warp, WIDTH), (8,)
    )  # fmt: skip
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles),
        warp_dims=(-3 if rows_per_warp == 1 else -5,),
        lane_dims=(-2,),
        vector_dim=-1,
    )


class _Sums(NamedTuple):
    """Sums over the columns seen so far, a term in every thread, (rows, WIDTH).

    Attributes:
      products: of a row of x with the block's weights, by half.
      x: of the row; None where the norm needs none.
      squares: of the row's squares, or None.
    """

    products: tuple[Any, ...]
    x: Any
    squares: Any


class _SkinnyKernelCall(NamedTuple):
    operands: SkinnyOperands
    tiling: SkinnyTiling
    norm: RowNorm | None

    @property
    def layout(self) -> Any:
        return matrix_layout(self.tiling.rows_per_warp)

    @property
    def subtracts_mean(self) -> bool:
        return self.norm is not None and self.norm.kind == "layer"

    @property
    def sums_weights(self) -> bool:
        """Whether the kernel adds up the weights that it reads."""
        return self.subtracts_mean and self.operands.weight_sums is None

    @property
    def first(self) -> Any:
        """The block's first output feature."""
        return lax.axis_index("n") * self.tiling.rows

    def run(self) -> list[Any]:
        """The output features of the block for every row of x, float32.

        With factor r = rsqrt(mean(x²) + eps), or of the variance, and mean μ of a row,

            norm(x) Wᵀ = r (x Wᵀ - μ Σ_k W_k)

        so that no product waits for the norm.
        """
        num_rows, in_features = self.operands.x.shape
        sums = [_Sums((None,) * self.operands.halves, None, None)] * num_rows
        weight_sums: tuple[Any, ...] = (None,) * self.operands.halves
        totals = self.load_weight_sums()
        loaded = self.load_step(0)
        for start in range(0, in_features, self.tiling.step):
            tiles, next_start = loaded, start + self.tiling.step
            # The next weights are on their way while these are used.
            loaded = self.load_step(next_start) if next_start < in_features else []
            for weights, rows in tiles:
                wide = [weight.astype(jnp.float32) for weight in weights]
                if self.sums_weights:
                    weight_sums = tuple(map(_add, weight_sums, wide))
                for row, load in enumerate(rows):
                    sums[row] = self.add(sums[row], load(), wide)
        if self.sums_weights:
            totals = [each.sum(axis=1) for each in weight_sums]
        return [self.finish(row, each, totals) for row, each in enumerate(sums)]

    def add(self, sums: _Sums, x: Any, weights: Sequence[Any]) -> _Sums:
        x = x.astype(jnp.float32)
        x = lax.broadcast_in_dim(x, (self.tiling.rows, WIDTH), [1])
        x = plgpu.layout_cast(x, self.layout)
        products = tuple(
            _add(old, x * weight) for old, weight in zip(sums.products, weights, strict=True)
        )
        return _Sums(
            products,
            _add(sums.x, x) if self.subtracts_mean else None,
            None if self.norm is None else _add(sums.squares, x * x),
        )

    def load_step(self, start: int) -> list[tuple[list[Any], list[Callable[[], Any]]]]:
        """Weights of a step by tile of columns and half, and loads of the rows of x."""
        num_rows, in_features = self.operands.x.shape
        columns = range(start, min(start + self.tiling.step, in_features), WIDTH)
        weights = [self.load_weights(column) for column in columns]
        rows = [
            [partial(self.load_x, row, column) for row in range(num_rows)] for column in columns
        ]
        if num_rows * len(columns) * WIDTH <= MAX_LOADED_AHEAD:
            # Few rows are loaded together with the weights: one wait for memory.
            rows = [[_already(load()) for load in loads] for loads in rows]
        return list(zip(weights, rows, strict=True))

    def load_weights(self, column: int) -> list[Any]:
        """Weights of a tile of columns, by half."""
        values = self.operands.values
        loaded = []
        for half in range(self.operands.halves):
            rows = pl.ds(self.first + self.operands.half_start(half), self.tiling.rows)
            ref = values.at[rows, pl.ds(column, WIDTH)]
            loaded.append(plgpu.load(ref, layout=self.layout, optimized=False))
        return loaded

    def load_weight_sums(self) -> list[Any]:
        """Sums of weights that were made before, by half; none for other norms than LayerNorm."""
        ref = self.operands.weight_sums
        halves = range(0 if ref is None else self.operands.halves)
        return [self.vector(ref, self.operands.half_start(half)) for half in halves]

    def load_x(self, row: int, column: int) -> Any:
        ref = self.operands.x.at[row, pl.ds(column, WIDTH)]
        return plgpu.load(ref, layout=self.layout.reduce(0), optimized=False)

    def finish(self, row: int, sums: _Sums, weight_sums: Sequence[Any]) -> Any:
        """The output features of a row of x after norm and epilogue."""
        by_half = [products.sum(axis=1) for products in sums.products]
        if self.norm is not None:
            share = 1 / self.operands.x.shape[1]
            by_half = self.operands.apply_norm(
                self.norm,
                by_half,
                mean=sums.x.sum(axis=1) * share if self.subtracts_mean else None,
                mean_square=sums.squares.sum(axis=1) * share,
                weight_sums=weight_sums,
            )
        return self.operands.apply_epilogue(
            by_half, self.vector, lambda added: self.vector(added.at[row])
        )

    def vector(self, ref: Any, offset: int = 0) -> Any:
        """The block's output features of a vector, as float32."""
        ref = ref.at[pl.ds(self.first + offset, self.tiling.rows)]
        return plgpu.load(ref, layout=self.layout.reduce(1), optimized=False).astype(jnp.float32)


def _add(total: Any, term: Any) -> Any:
    return term if total is None else total + term


def _already(loaded: Any) -> Callable[[], Any]:
    return lambda: loaded


def skinny_kernel(
    operands: SkinnyOperands,
    results: Sequence[Any],
    outputs_smem: Any,
    *,
    tiling: SkinnyTiling,
    norm: RowNorm | None,
    parts: Sequence[Part],
) -> None:
    """Some output features of every row of x."""
    call = _SkinnyKernelCall(operands, tiling, norm)
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
