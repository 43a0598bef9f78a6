"""Rows through registers: a warpgroup goes down its rows, loading the next ones ahead.

Thread i holds the same few columns of every row. Vectors therefore stay in its registers, and sums
over rows need no other thread.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.rowwise.mosaic_gpu.block_sizes import RowTiling

Row = Any  # float32 in registers, THREADS threads side by side
Scalar = Any  # float32, the same in all threads


class RowOperands(NamedTuple):
    """Operands of a kernel: arrays in global memory, or one row of them in registers.

    Fields have None for operands that are not given.

    Attributes:
      rows: (N, W), any float dtype; float32 in registers.
      vectors: (W,) float32.
      moments: (N,) float32, one number for every row.
    """

    rows: tuple[Any, ...]
    vectors: tuple[Any, ...] = ()
    moments: tuple[Any, ...] = ()


class RowResults(NamedTuple):
    """Results of a kernel: arrays in global memory, or one row of them in registers.

    Attributes:
      rows: (N, W).
      sums: terms of sums over rows; in global memory (blocks, W) float32.
      moments: (N,) float32.
    """

    rows: tuple[Any, ...]
    sums: tuple[Any, ...] = ()
    moments: tuple[Any, ...] = ()


# One row of the operands to one row of the results.
RowFunction = Callable[[RowOperands], RowResults]


class RowIterator(NamedTuple):
    """One block's loop over its rows.

    Attributes:
      function: what to compute from a row.
      operands: references.
      results: references.
      tiling: how rows are divided into blocks.
      num_rows: rows of all blocks.
    """

    function: RowFunction
    operands: RowOperands
    results: RowResults
    tiling: RowTiling
    num_rows: int

    @property
    def layout(self) -> Any:
        """The layout of a row in registers."""
        return plgpu.Layout.WG_STRIDED((self.tiling.tile,), vec_size=self.tiling.vec_size)

    @property
    def columns(self) -> Any:
        """The block's columns."""
        return pl.ds(lax.axis_index("c") * self.tiling.tile, self.tiling.tile)

    def run(self, rows_per_block: int) -> None:
        """Computes all rows of the block, and writes its sums."""
        per_step = self.tiling.rows_per_step
        block = lax.axis_index("r")
        first = block * rows_per_block
        num_rows = jnp.minimum(rows_per_block, self.num_rows - first)
        steps = lax.div(num_rows, per_step)
        vectors = self._load_vectors() if self.tiling.vectors_in_registers else None
        zeros = plgpu.layout_cast(jnp.zeros((self.tiling.tile,), jnp.float32), self.layout)

        def load_and_compute(start, count, sums):
            return self._compute(start, self._load_rows(start, count), vectors, sums)

        def prefetching_step(i, carry):
            loaded, sums = carry
            # The last step loads its own rows again: no traffic from memory.
            next_step = jnp.minimum(i + 1, steps - 1)
            prefetched = self._load_rows(first + next_step * per_step, per_step)
            return prefetched, self._compute(first + i * per_step, loaded, vectors, sums)

        def step(i, sums):
            return load_and_compute(first + i * per_step, per_step, sums)

        sums = jax.tree.map(lambda _: zeros, self.results.sums)
        if self.tiling.prefetch:
            carry = self._load_rows(first, per_step), sums
            sums = lax.fori_loop(0, steps, prefetching_step, carry)[1]
        else:
            sums = lax.fori_loop(0, steps, step, sums)
        if self.num_rows % per_step:
            sums = lax.fori_loop(
                steps * per_step,
                num_rows,
                lambda i, sums: load_and_compute(first + i, 1, sums),
                sums,
            )

        def store_sum(ref, value):
            ref[block, self.columns] = value

        jax.tree.map(store_sum, self.results.sums, sums)

    def _load_vectors(self) -> tuple:
        return jax.tree.map(self._load, self.operands.vectors)

    def _load(self, ref: Any, *index: Any) -> Row:
        return plgpu.load(ref.at[*index, self.columns], layout=self.layout)

    def _load_rows(self, start: Any, count: int) -> list[tuple]:
        def load(row):
            if self.num_rows % self.tiling.rows_per_step:
                row = jnp.clip(row, 0, self.num_rows - 1)
            rows = jax.tree.map(lambda ref: self._load(ref, row), self.operands.rows)
            return rows, jax.tree.map(lambda ref: ref[row], self.operands.moments)

        return [load(start + i) for i in range(count)]

    def _compute(
        self, start: Any, loaded: list[tuple], vectors: tuple | None, sums: tuple
    ) -> tuple:
        """Computes and writes loaded rows, and adds to the sums."""
        for i, (rows, moments) in enumerate(loaded):
            wide = jax.tree.map(lambda row: row.astype(jnp.float32), rows)
            row_vectors = self._load_vectors() if vectors is None else vectors
            result = self.function(RowOperands(wide, row_vectors, moments))

            def store_row(ref, value, row=start + i):
                ref[row, self.columns] = value.astype(ref.dtype)

            def store_moment(ref, value, row=start + i):
                ref[row] = value

            jax.tree.map(store_row, self.results.rows, result.rows)
            jax.tree.map(store_moment, self.results.moments, result.moments)
            sums = jax.tree.map(jnp.add, sums, result.sums)
        return sums
