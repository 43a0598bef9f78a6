"""The kernel of 17 to 64 rows: `wgmma` with the rows as its first operand, columns over a cluster.

Every block reads all rows of its columns. With few output features a block these would be most of
what it reads: blocks have many output features, and the blocks of a cluster a share of the columns
each. Their sums meet in each other's shared memory, where every block finishes a share of the rows.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.mosaic_gpu import (
    cluster_arrive,
    cluster_wait,
    store,
    widen_int8,
)
from pallas_kernels.skinny_matmul.block_sizes import (
    CLUSTER_AXIS,
    WGMMA_DEPTH,
    WGMMA_ROWS,
    WideTiling,
)
from pallas_kernels.skinny_matmul.mosaic_gpu.fragments import (
    integers_layout,
    swap_pairs,
    vectors_layout,
)
from pallas_kernels.skinny_matmul.mosaic_gpu.operands import SkinnyOperands
from pallas_kernels.skinny_matmul.types import Int8Matrix, Part, RowNorm, starts_of

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
      x_pieces: (2, WGMMA_ROWS, WGMMA_DEPTH), float32 rows as two of bfloat16 for the interpreter,
        whose wgmma takes no arrays; or None.
      barriers: for every stage, completes when x and weights have arrived.
      products: (splits, WGMMA_ROWS, features of all halves + padding), a block's sums.
      x_sums: (splits, 2, WGMMA_ROWS), a block's sums of a row of x and of its squares; None without
        a norm.
    """

    x: Any
    weights: Any
    wide_weights: Any
    x_pieces: Any
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
        x_pieces = _tiled_smem(2, WGMMA_ROWS, WGMMA_DEPTH, dtype=jnp.bfloat16)
        is_float32 = operands.x.dtype == jnp.float32
        x_sums = plgpu.SMEM((splits, 2, WGMMA_ROWS), jnp.float32)
        return cls(
            _tiled_smem(tiling.stages, WGMMA_ROWS, WGMMA_DEPTH, dtype=operands.x.dtype),
            weights,
            wide_weights if is_int8 else None,
            x_pieces if is_float32 and is_interpreted else None,
            plgpu.Barrier(num_arrivals=1 + operands.halves, num_barriers=tiling.stages),
            plgpu.SMEM((splits, WGMMA_ROWS, features + _PADDING), jnp.float32),
            None if norm is None else x_sums,
        )


class _RowSums(NamedTuple):
    """Sums of every row of x over the columns seen so far, and of its squares; None if unused."""

    x: Any
    squares: Any


class _WideKernelCall(NamedTuple):
    operands: SkinnyOperands
    scratch: WideScratch
    tiling: WideTiling
    norm: RowNorm | None
    is_interpreted: bool

    @property
    def subtracts_mean(self) -> bool:
        return self.norm is not None and self.norm.kind == "layer"

    @property
    def features(self) -> int:
        """Output features of the block in all halves."""
        return self.tiling.features * self.operands.halves

    @property
    def rows(self) -> int:
        """Rows that a block finishes."""
        return self.operands.x.shape[0] // self.tiling.splits

    @property
    def layout(self) -> Any:
        """The layout of results (rows, columns)."""
        return vectors_layout(self.rows, self.tiling.columns)

    @property
    def first(self) -> Any:
        """The block's first output feature."""
        return lax.axis_index("n") * self.tiling.features

    @property
    def splits(self) -> Iterable[Any]:
        """The shares of columns and rows of this block: one, or in the interpreter all."""
        if self.is_interpreted:
            return range(self.tiling.splits)
        return [lax.axis_index(CLUSTER_AXIS) if self.tiling.splits > 1 else 0]

    def run(self, write: Any) -> None:
        """Computes the block's output features; `write(row, column, y)` for every tile of them.

        A tile y is float32 in `layout`; its first row and first output feature are given.
        """
        for split in self.splits:
            self.multiply(split)
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
            write(split * self.rows, self.first + column, self.finish(of_tile, operands))
        if self.has_cluster:
            # The others may still read the sums of this block.
            cluster_wait()

    @property
    def has_cluster(self) -> bool:
        return self.tiling.splits > 1 and not self.is_interpreted

    def multiply(self, split: Any) -> None:
        """Sums over a share of the columns to shared memory."""
        steps = self.operands.values.shape[1] // WGMMA_DEPTH
        begin, end = ((split + i) * steps // self.tiling.splits for i in range(2))
        num_steps = end - begin
        for stage in range(self.tiling.stages):
            self.copy(begin + stage, stage)

        def accumulate(acc: Any) -> tuple[Any, _RowSums]:
            def body(step: Any, sums: _RowSums) -> _RowSums:
                return self.add_step(begin, step, num_steps, acc, sums)

            row_sums = lax.fori_loop(0, num_steps, body, self.no_row_sums())
            return acc[...], row_sums

        shape = (WGMMA_ROWS, self.features)
        products, row_sums = pl.run_scoped(accumulate, _Accumulator(shape, jnp.float32))
        own = split if self.is_interpreted else 0
        store(self.scratch.products.at[own, :, pl.ds(0, self.features)], products)
        for i, of_rows in enumerate(row_sums):
            if of_rows is not None:
                store(self.scratch.x_sums.at[own, i], of_rows)

    def copy(self, tile: Any, stage: Any) -> None:
        """Starts to copy x and weights of a tile of columns to a stage."""
        x, barrier = self.operands.x, self.scratch.barriers.at[stage]
        columns = pl.ds(tile * WGMMA_DEPTH, WGMMA_DEPTH)
        for half in range(self.operands.halves):
            first = self.first + self.operands.half_start(half)
            source = self.operands.values.at[pl.ds(first, self.tiling.features), columns]
            features = pl.ds(half * self.tiling.features, self.tiling.features)
            plgpu.copy_gmem_to_smem(source, self.scratch.weights.at[stage, features], barrier)
        x_smem = self.scratch.x.at[stage, pl.ds(0, x.shape[0])]
        plgpu.copy_gmem_to_smem(x.at[:, columns], x_smem, barrier)

    def no_row_sums(self) -> _RowSums:
        zeros = jnp.zeros(WGMMA_ROWS, jnp.float32)
        zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1))
        return _RowSums(
            zeros if self.subtracts_mean else None, None if self.norm is None else zeros
        )

    def add_step(self, begin: Any, step: Any, num_steps: Any, acc: Any, sums: _RowSums) -> _RowSums:
        stages = self.tiling.stages
        stage = lax.rem(step, stages)
        plgpu.barrier_wait(self.scratch.barriers.at[stage])
        weights_smem, x_smem = self.scratch.weights.at[stage], self.scratch.x.at[stage]
        wide = self.load_integers(weights_smem)
        x = None
        if self.has_float32_rows or self.norm is not None:
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
            self.copy(begin + following, lax.rem(following, stages))

        for piece in self.split(x) if self.has_float32_rows else [x_smem]:
            plgpu.wgmma(acc, piece, weights_smem.transpose((1, 0)))
        if self.has_float32_rows:
            # The products read the rows' registers.
            plgpu.wgmma_wait(0)
        if x is None or self.norm is None:
            return sums
        x = x.astype(jnp.float32)
        return _RowSums(
            sums.x + x.sum(axis=1) if self.subtracts_mean else None,
            sums.squares + (x * x).sum(axis=1),
        )

    @property
    def has_float32_rows(self) -> bool:
        return self.operands.x.dtype == jnp.float32

    def split(self, x: Any) -> list[Any]:
        """float32 numbers as two of bfloat16, which have 16 bits together: operands of wgmma."""
        high = x.astype(jnp.bfloat16)
        low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
        if self.scratch.x_pieces is None:
            return [high, low]
        for i, piece in enumerate([high, low]):
            store(self.scratch.x_pieces.at[i], piece)
        return [self.scratch.x_pieces.at[i] for i in range(2)]

    def load_integers(self, weights_smem: Any) -> Any:
        """8-bit weights of a stage as bfloat16; None for weights that are bfloat16."""
        if self.scratch.wide_weights is None:
            return None
        layout = integers_layout(self.features)
        values = plgpu.load(weights_smem, layout=layout, optimized=False)
        wide = widen_int8(values, layout, is_interpreted=self.is_interpreted)
        return wide.astype(jnp.bfloat16)

    def load_sums(self, split: Any, column: int) -> tuple[list[Any], _RowSums]:
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
            for i, is_used in enumerate([self.subtracts_mean, self.norm is not None])
        ]
        return by_half, _RowSums(*of_rows)

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
        first = self.first + column

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

    def finish(self, sums: tuple[list[Any], _RowSums], loaded: SkinnyOperands) -> Any:
        """The output features of a tile after norm and epilogue."""
        by_half, row_sums = sums
        if self.norm is not None:
            share = 1 / self.operands.values.shape[1]
            by_half = loaded.apply_norm(
                self.norm,
                by_half,
                mean=row_sums.x * share if self.subtracts_mean else None,
                mean_square=row_sums.squares * share,
                weight_sums=list(loaded.weight_sums.values()) if self.subtracts_mean else [],
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
    call = _WideKernelCall(operands, scratch, tiling, norm, is_interpreted)

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
