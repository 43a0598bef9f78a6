"""A Hopper kernel from a function of one row, and the functions of the row operations.

A warpgroup walks down some rows. Thread i holds the same few columns of every row, so vectors stay
in its registers, and sums over rows need no other thread. The next rows are on their way while
these are worked on.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128

Row = Any  # float32 in registers, THREADS threads side by side
Scalar = Any  # float32, the same in all threads


class Operands(NamedTuple):
    """What a kernel reads: arrays in memory, or one row of them in registers; None: there is none.

    Attributes:
      rows: (N, W), any float type; in registers float32.
      vectors: (W,) float32.
      moments: (N,) float32, a number for every row.
    """

    rows: tuple[Any, ...]
    vectors: tuple[Any, ...] = ()
    moments: tuple[Any, ...] = ()


class Results(NamedTuple):
    """What a kernel writes, in memory or for one row in registers.

    Attributes:
      rows: (N, W).
      sums: a row's part of a sum over rows; in memory (blocks, W) float32.
      moments: (N,) float32.
    """

    rows: tuple[Any, ...]
    sums: tuple[Any, ...] = ()
    moments: tuple[Any, ...] = ()


class Shape(NamedTuple):
    """How the rows are shared out.

    Attributes:
      tile: columns of a block.
      rows_at_once: rows that are loaded together.
      blocks: blocks at most.
      keep_vectors: whether vectors stay in registers; else every row reads them from the cache.
      ahead: whether the next rows are read before these are worked on.
    """

    tile: int
    rows_at_once: int
    blocks: int
    keep_vectors: bool = True
    ahead: bool = True

    @property
    def vec_size(self) -> int:
        """Neighbouring columns of a thread: 8 of bfloat16 are the 16 bytes of the widest load."""
        return next(size for size in (8, 4, 2, 1) if self.tile % (size * THREADS) == 0)

    def rows_per_block(self, rows: int, width: int) -> int:
        """Rows of every block but the last, which may have fewer."""
        wanted = max(1, self.blocks * self.tile // width)
        return pl.cdiv(rows, wanted * self.rows_at_once) * self.rows_at_once


RowFunction = Callable[[Operands], Results]


def run(
    function: RowFunction,
    operands: Operands,
    out: Results,
    shape: Shape,
    *,
    name: str,
    interpret: Any,
) -> Results:
    """Applies `function` to every row.

    Args:
      function: from one row of the operands in registers to one of the results.
      operands: arrays.
      out: dtypes of what it gives; None where it gives None.
      shape: how; the tile must divide the width.
      name: what profiles call it.
      interpret: `plgpu.InterpretGPUParams()` or None.

    Returns:
      Rows and moments; sums of every block, to be added up.
    """
    count, width = operands.rows[0].shape
    per_block = shape.rows_per_block(count, width)
    blocks = pl.cdiv(count, per_block)
    shapes = Results(
        *(
            jax.tree.map(partial(jax.ShapeDtypeStruct, size), dtypes)
            for size, dtypes in zip(((count, width), (blocks, width), (count,)), out, strict=True)
        )
    )
    arrays, structure = jax.tree.flatten(operands)
    outs, out_structure = jax.tree.flatten(shapes)

    def body(*refs):
        inputs = jax.tree.unflatten(structure, refs[: len(arrays)])
        results = jax.tree.unflatten(out_structure, refs[len(arrays) :])
        _Walk(function, inputs, results, shape, count).through_rows(per_block)

    body.__name__ = name
    results = plgpu.kernel(
        body,
        out_type=outs,
        grid=(blocks, width // shape.tile),
        grid_names=("r", "c"),
        # A thread reads nothing that it or another one writes.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )(*arrays)
    return jax.tree.unflatten(out_structure, results)


class _Walk(NamedTuple):
    """The way of one block down its rows."""

    function: RowFunction
    inputs: Operands
    results: Results
    shape: Shape
    count: int

    @property
    def layout(self) -> Any:
        return plgpu.Layout.WG_STRIDED((self.shape.tile,), vec_size=self.shape.vec_size)

    @property
    def columns(self) -> Any:
        return pl.ds(lax.axis_index("c") * self.shape.tile, self.shape.tile)

    def through_rows(self, per_block: int) -> None:
        at_once = self.shape.rows_at_once
        block = lax.axis_index("r")
        first = block * per_block
        rows = jnp.minimum(per_block, self.count - first)
        steps = lax.div(rows, at_once)
        vectors = self._load_vectors() if self.shape.keep_vectors else None
        zeros = plgpu.layout_cast(jnp.zeros((self.shape.tile,), jnp.float32), self.layout)

        def take(start, number, sums):
            return self._take(start, self._load_rows(start, number), vectors, sums)

        def step_ahead(i, carry):
            loaded, sums = carry
            # In the last step what it has just read, which costs no way to memory.
            after = self._load_rows(first + jnp.minimum(i + 1, steps - 1) * at_once, at_once)
            return after, self._take(first + i * at_once, loaded, vectors, sums)

        def step(i, sums):
            return take(first + i * at_once, at_once, sums)

        sums = jax.tree.map(lambda _: zeros, self.results.sums)
        if self.shape.ahead:
            carry = self._load_rows(first, at_once), sums
            sums = lax.fori_loop(0, steps, step_ahead, carry)[1]
        else:
            sums = lax.fori_loop(0, steps, step, sums)
        if self.count % at_once:
            sums = lax.fori_loop(
                steps * at_once, rows, lambda i, sums: take(first + i, 1, sums), sums
            )

        def store_sum(ref, value):
            ref[block, self.columns] = value

        jax.tree.map(store_sum, self.results.sums, sums)

    def _load_vectors(self) -> tuple:
        return jax.tree.map(self._load, self.inputs.vectors)

    def _load(self, ref: Any, *index: Any) -> Row:
        return plgpu.load(ref.at[*index, self.columns], layout=self.layout)

    def _load_rows(self, start: Any, number: int) -> list[tuple]:
        def load(row):
            if self.count % self.shape.rows_at_once:
                row = jnp.clip(row, 0, self.count - 1)
            rows = jax.tree.map(lambda ref: self._load(ref, row), self.inputs.rows)
            return rows, jax.tree.map(lambda ref: ref[row], self.inputs.moments)

        return [load(start + i) for i in range(number)]

    def _take(self, start: Any, loaded: list[tuple], kept: tuple | None, sums: tuple) -> tuple:
        for i, (rows, moments) in enumerate(loaded):
            wide = jax.tree.map(lambda row: row.astype(jnp.float32), rows)
            vectors = self._load_vectors() if kept is None else kept
            result = self.function(Operands(wide, vectors, moments))

            def store_row(ref, value, row=start + i):
                ref[row, self.columns] = value.astype(ref.dtype)

            def store_moment(ref, value, row=start + i):
                ref[row] = value

            jax.tree.map(store_row, self.results.rows, result.rows)
            jax.tree.map(store_moment, self.results.moments, result.moments)
            sums = jax.tree.map(jnp.add, sums, result.sums)
        return sums
