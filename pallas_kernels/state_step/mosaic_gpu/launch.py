"""The kernel of a step of CEMA: a warpgroup goes down its rows, its channels side by side."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.common.mosaic_gpu import launch
from pallas_kernels.state_step.block_sizes import StepTiling, count_blocks
from pallas_kernels.state_step.types import CemaStepTables


class StepOperands(NamedTuple):
    """Operands of the kernel: arrays, or references in the kernel.

    Attributes:
      x: (B, D) bfloat16.
      tables: float32.
      state: reference of (S, 2N, D) float32, which the kernel updates.
      active: (B,) int32, 0 for rows that stay; None: all rows change.
    """

    x: Any
    tables: CemaStepTables
    state: Any
    active: Any


class _StepKernelCall(NamedTuple):
    operands: StepOperands
    y: Any
    tiling: StepTiling

    def load(self, ref: Any, *index: Any) -> Any:
        """A block's channels of a row, as float32 in registers."""
        layout = plgpu.Layout.WG_STRIDED((self.tiling.tile,), vec_size=self.tiling.vec_size)
        loaded = plgpu.load(ref.at[*index, self.channels], layout=layout)
        return loaded.astype(jnp.float32)

    @property
    def channels(self) -> Any:
        return pl.ds(lax.axis_index("c") * self.tiling.tile, self.tiling.tile)

    def run(self) -> None:
        (x_gmem, tables, state_gmem, active_gmem), tiling = self.operands, self.tiling
        order = tables.p.shape[0]
        tables_by_order = [
            [self.load(table, n) for table in (tables.q_re, tables.q_im, tables.p, tables.g_re,
                                               tables.g_im)]
            for n in range(order)
        ]  # fmt: skip
        omega = self.load(tables.omega)

        def update(row) -> None:
            x = self.load(x_gmem, row)
            y = omega * x
            # All loads come before the first store, which the compiler could not move them over.
            state = [
                (self.load(state_gmem, row, n), self.load(state_gmem, row, order + n))
                for n in range(order)
            ]
            for n, (q_re, q_im, p, g_re, g_im) in enumerate(tables_by_order):
                re, im = state[n]
                new_re = q_re * re - q_im * im + p * x
                new_im = q_re * im + q_im * re
                y = y + g_re * new_re - g_im * new_im
                state_gmem[row, n, self.channels] = new_re
                state_gmem[row, order + n, self.channels] = new_im
            self.y[row, self.channels] = y.astype(self.y.dtype)

        def step(row, _):
            if active_gmem is None:
                update(row)
            else:
                pl.when(active_gmem[row] != 0)(lambda: update(row))
            return ()

        first = lax.axis_index("r") * tiling.rows_per_block
        last = jnp.minimum(first + tiling.rows_per_block, x_gmem.shape[0])
        lax.fori_loop(first, last, step, ())


# Layers share one compiled kernel, because `jit` traces it once.
@partial(jax.jit, static_argnums=4, static_argnames="interpret")
def launch_step(
    x: Float[Array, "B D"],
    tables: CemaStepTables,
    state_ref: Any,
    active: Bool[Array, " B"] | None,
    tiling: StepTiling,
    *,
    interpret: Any,
) -> Float[Array, "B D"]:
    """Runs the kernel and returns y.

    Args:
      x: bfloat16.
      tables: float32.
      state_ref: from `jax.new_ref`, float32; rows 0..B-1 are updated.
      active: rows that are updated; the y of others is not written. None: all.
      tiling: how rows and channels are divided into blocks; the tile must divide D.
      interpret: from `interpret_params`.
    """

    def kernel(operands: StepOperands, y: Any, scratch: Any) -> None:
        del scratch
        _StepKernelCall(operands, y, tiling).run()

    return launch(
        kernel,
        StepOperands(x, tables, state_ref, None if active is None else active.astype(jnp.int32)),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        name="state_step",
        grid=count_blocks(x.shape[0], x.shape[1], tiling),
        interpret=interpret,
    )
