"""The sums of `wide.py`: rows times a block's weights over a share of the columns, by `wgmma`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.mosaic_gpu import store, widen_int8
from pallas_kernels.skinny_matmul.block_sizes import WGMMA_DEPTH, WGMMA_ROWS, WideTiling
from pallas_kernels.skinny_matmul.mosaic_gpu.fragments import integers_layout
from pallas_kernels.skinny_matmul.mosaic_gpu.operands import SkinnyOperands
from pallas_kernels.skinny_matmul.types import RowNorm

# Unused columns after each row of sums: without them all rows begin in the same bank.
_PADDING = 8
# Public, but type checkers do not see it.
_Accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def _tiled_smem(*shape: int, dtype: Any) -> Any:
    """Shared memory, tiled and swizzled for wgmma."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms: Any = (
        plgpu.TilingTransform((8, columns)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class WideScratch(NamedTuple):
    """Shared memory and barriers. `splits` is 1, or in the interpreter the cluster's blocks.

    Attributes:
      x: (stages, WGMMA_ROWS, WGMMA_DEPTH), a ring; only rows that exist are filled.
      weights: (stages, features of all halves, WGMMA_DEPTH), a ring.
      wide_weights: (2, features of all halves, WGMMA_DEPTH), integers as bfloat16; or None.
      barriers: for every stage, completes when x and weights have arrived.
      products: (splits, WGMMA_ROWS, features of all halves + padding), a block's sums.
      x_sums: (splits, 2, WGMMA_ROWS), a block's sums of a row of x and of its squares; None without
        a norm.
    """

    x: Any
    weights: Any
    wide_weights: Any
    barriers: Any
    products: Any
    x_sums: Any

    @classmethod
    def make(
        cls,
        operands: SkinnyOperands,
        tiling: WideTiling,
        norm: RowNorm | None,
        *,
        is_interpreted: bool,
    ) -> "WideScratch":
        """Shared memory for operands with WGMMA_ROWS rows or fewer."""
        features = tiling.features * operands.halves
        splits = tiling.splits if is_interpreted else 1
        shape = (tiling.stages, features, WGMMA_DEPTH)
        dtype = operands.values.dtype
        is_int8 = dtype == jnp.int8
        weights = plgpu.SMEM(shape, dtype) if is_int8 else _tiled_smem(*shape, dtype=dtype)
        wide_weights = _tiled_smem(2, features, WGMMA_DEPTH, dtype=jnp.bfloat16)
        x_sums = plgpu.SMEM((splits, 2, WGMMA_ROWS), jnp.float32)
        return cls(
            _tiled_smem(tiling.stages, WGMMA_ROWS, WGMMA_DEPTH, dtype=operands.x.dtype),
            weights,
            wide_weights if is_int8 else None,
            plgpu.Barrier(num_arrivals=1 + operands.halves, num_barriers=tiling.stages),
            plgpu.SMEM((splits, WGMMA_ROWS, features + _PADDING), jnp.float32),
            None if norm is None else x_sums,
        )


class RowSums(NamedTuple):
    """Sums of every row of x over the columns seen so far, and of its squares; None if unused."""

    x: Any
    squares: Any


class WideProducts(NamedTuple):
    """The first half of a block's work: sums to shared memory.

    Attributes:
      operands: references in global memory.
      scratch: shared memory.
      tiling: how the matrix is divided.
      norm: of the rows.
      is_interpreted: whether the kernel's interpreter runs this.
    """

    operands: SkinnyOperands
    scratch: WideScratch
    tiling: WideTiling
    norm: RowNorm | None
    is_interpreted: bool

    @property
    def subtracts_mean(self) -> bool:
        """Whether the norm is LayerNorm."""
        return self.norm is not None and self.norm.kind == "layer"

    @property
    def features(self) -> int:
        """Output features of the block in all halves."""
        return self.tiling.features * self.operands.halves

    @property
    def first(self) -> Any:
        """The block's first output feature."""
        return lax.axis_index("n") * self.tiling.features

    def multiply(self, split: Any) -> None:
        """Writes the sums over a share of the columns, those of block `split` of the cluster."""
        steps = self.operands.values.shape[1] // WGMMA_DEPTH
        begin, end = ((split + i) * steps // self.tiling.splits for i in range(2))
        num_steps = end - begin
        # Weights first: they come from memory, the rows from L2.
        for copy in (self._copy_weights, self._copy_x):
            for stage in range(self.tiling.stages):
                copy(begin + stage, stage)

        def accumulate(acc: Any) -> tuple[Any, RowSums]:
            def body(step: Any, sums: RowSums) -> RowSums:
                return self._add_step(begin, step, num_steps, acc, sums)

            row_sums = lax.fori_loop(0, num_steps, body, self._no_row_sums())
            return acc[...], row_sums

        shape = (WGMMA_ROWS, self.features)
        products, row_sums = pl.run_scoped(accumulate, _Accumulator(shape, jnp.float32))
        own = split if self.is_interpreted else 0
        store(self.scratch.products.at[own, :, pl.ds(0, self.features)], products)
        for i, of_rows in enumerate(row_sums):
            if of_rows is not None:
                store(self.scratch.x_sums.at[own, i], of_rows)

    def _copy_weights(self, tile: Any, stage: Any) -> None:
        """Starts to copy the weights of a tile of columns to a stage."""
        columns = pl.ds(tile * WGMMA_DEPTH, WGMMA_DEPTH)
        for half in range(self.operands.halves):
            first = self.first + self.operands.half_start(half)
            source = self.operands.values.at[pl.ds(first, self.tiling.features), columns]
            features = pl.ds(half * self.tiling.features, self.tiling.features)
            target = self.scratch.weights.at[stage, features]
            plgpu.copy_gmem_to_smem(source, target, self.scratch.barriers.at[stage])

    def _copy_x(self, tile: Any, stage: Any) -> None:
        """Starts to copy a tile of columns of the rows to a stage."""
        source = self.operands.x.at[:, pl.ds(tile * WGMMA_DEPTH, WGMMA_DEPTH)]
        target = self.scratch.x.at[stage, pl.ds(0, source.shape[0])]
        plgpu.copy_gmem_to_smem(source, target, self.scratch.barriers.at[stage])

    def _no_row_sums(self) -> RowSums:
        zeros = jnp.zeros(WGMMA_ROWS, jnp.float32)
        zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1))
        return RowSums(zeros if self.subtracts_mean else None, None if self.norm is None else zeros)

    def _add_step(self, begin: Any, step: Any, num_steps: Any, acc: Any, sums: RowSums) -> RowSums:
        stages = self.tiling.stages
        stage = lax.rem(step, stages)
        plgpu.barrier_wait(self.scratch.barriers.at[stage])
        weights_smem, x_smem = self.scratch.weights.at[stage], self.scratch.x.at[stage]
        wide = self._load_integers(weights_smem)
        x = None
        if self.norm is not None:
            x = plgpu.load(x_smem, layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.wgmma_wait(0)
        if wide is not None:
            weights_smem = self.scratch.wide_weights.at[lax.rem(step, 2)]
            store(weights_smem, wide)
        # All warps have read the stage of the step before, and written the integers of this one.
        plgpu.commit_smem()
        following = step - 1 + stages

        @pl.when((step > 0) & (following < num_steps))
        def _():
            free = lax.rem(following, stages)
            self._copy_weights(begin + following, free)
            self._copy_x(begin + following, free)

        plgpu.wgmma(acc, x_smem, weights_smem.transpose((1, 0)))
        if x is None:
            return sums
        x = x.astype(jnp.float32)
        return RowSums(
            sums.x + x.sum(axis=1) if self.subtracts_mean else None,
            sums.squares + (x * x).sum(axis=1),
        )

    def _load_integers(self, weights_smem: Any) -> Any:
        """8-bit weights of a stage as bfloat16; None for weights that are bfloat16."""
        if self.scratch.wide_weights is None:
            return None
        layout = integers_layout(self.features)
        values = plgpu.load(weights_smem, layout=layout, optimized=False)
        wide = widen_int8(values, layout, is_interpreted=self.is_interpreted)
        return wide.astype(jnp.bfloat16)
