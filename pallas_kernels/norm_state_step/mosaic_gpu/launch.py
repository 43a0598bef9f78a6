"""The kernel: a warp has a group of channels, and goes down the rows of its block."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.common.mosaic_gpu import launch
from pallas_kernels.state_step import CemaStepTables

# Groups of a block: one for each of its warps.
GROUPS = 4


class NormStateOperands(NamedTuple):
    """Operands of the kernel: arrays, or references in the kernel; channels as (G, F).

    Attributes:
      x: (B, G, F) bfloat16.
      scale: (G, F) float32, or None.
      bias: (G, F) float32, or None.
      tables: (N, G, F) float32.
      state: reference of (S, 2N, G, F) float32, which the kernel updates.
      mean: reference of (S, G) float32, which it updates as well.
      var: the same.
      count: (S,) int32, tokens with this one.
      active: (B,) int32, 0 for rows that stay; None: all rows change.
    """

    x: Any
    scale: Any
    bias: Any
    tables: CemaStepTables
    state: Any
    mean: Any
    var: Any
    count: Any
    active: Any


class NormStateScratch(NamedTuple):
    """Shared memory.

    Attributes:
      moments: (2, 4) float32, new means and variances.
      outputs: (2, 4, F), u and y: a thread stores fewer bytes of its tile than a store needs.
    """

    moments: Any
    outputs: Any


class _NormStateKernelCall(NamedTuple):
    operands: NormStateOperands
    u: Any
    y: Any
    scratch: NormStateScratch
    eps: float

    @property
    def size(self) -> int:
        """Channels of a group."""
        return self.operands.x.shape[2]

    @property
    def layout(self) -> Any:
        """Groups over warps, their channels over threads."""
        return plgpu.Layout.TILED(
            plgpu.Tiling(((GROUPS, self.size), (self.size // 32,))),
            warp_dims=(-3,),
            lane_dims=(-2,),
            vector_dim=-1,
        )

    @property
    def first_group(self) -> Any:
        return lax.axis_index("g") * GROUPS

    @property
    def groups(self) -> Any:
        return pl.ds(self.first_group, GROUPS)

    def load(self, ref: Any, *index: Any) -> Any:
        """The channels of a row's groups, as float32 in registers."""
        loaded = plgpu.load(ref.at[*index, self.groups], layout=self.layout, optimized=False)
        return loaded.astype(jnp.float32)

    def load_moments(self, ref: Any, row: Any) -> Any:
        layout = self.layout.reduce(1)
        return plgpu.load(ref.at[row, self.groups], layout=layout, optimized=False)

    def over_channels(self, groups: Any) -> Any:
        shape = (GROUPS, self.size)
        return plgpu.layout_cast(lax.broadcast_in_dim(groups, shape, [0]), self.layout)

    def update(self, row: Any, tables: list[list[Any]]) -> None:
        """One token of a row."""
        operands = self.operands
        order = operands.tables.p.shape[0]
        # All loads come before the first store, which the compiler could not move them over.
        x = self.load(operands.x, row)
        state = [
            (self.load(operands.state, row, n), self.load(operands.state, row, order + n))
            for n in range(order)
        ]
        u = self.normalize(row, x).astype(self.u.dtype)
        self.scratch.outputs[0] = u
        u = u.astype(jnp.float32)
        y = self.load(operands.tables.omega) * u
        for n, (q_re, q_im, p, g_re, g_im) in enumerate(tables):
            re, im = state[n]
            new_re = q_re * re - q_im * im + p * u
            new_im = q_re * im + q_im * re
            y = y + g_re * new_re - g_im * new_im
            operands.state[row, n, self.groups] = new_re
            operands.state[row, order + n, self.groups] = new_im
        self.scratch.outputs[1] = y.astype(self.y.dtype)
        plgpu.commit_smem()
        strided = plgpu.Layout.WG_STRIDED((GROUPS, self.size), vec_size=self.size // 32)
        tile = GROUPS * self.size
        channels = pl.ds(lax.axis_index("g") * tile, tile)
        for i, ref in enumerate((self.u, self.y)):
            output = plgpu.load(self.scratch.outputs.at[i], layout=strided)
            ref[row, channels] = output.reshape(tile)

    def normalize(self, row: Any, x: Any) -> Any:
        """TimestepNorm of a token; stores the moments with it (Chan et al. 1979)."""
        operands = self.operands
        old_mean = self.load_moments(operands.mean, row)
        old_var = self.load_moments(operands.var, row)
        share = 1.0 / operands.count[row].astype(jnp.float32)
        mean = x.sum(axis=1) * (1 / self.size)
        centered = x - self.over_channels(mean)
        var = (centered * centered).sum(axis=1) * (1 / self.size)
        shift = mean - old_mean
        new_mean = old_mean + shift * share
        new_var = (1 - share) * (old_var + share * (shift * shift)) + share * var
        self.store_moments(row, new_mean, new_var)
        factor = lax.rsqrt(new_var + self.eps)
        u = (x - self.over_channels(new_mean)) * self.over_channels(factor)
        if operands.scale is not None:
            u = u * self.load(operands.scale)
        return u if operands.bias is None else u + self.load(operands.bias)

    def store_moments(self, row: Any, mean: Any, var: Any) -> None:
        """Stores moments one at a time: an array of few is less than the 32 bytes of a store."""
        self.scratch.moments[0] = mean
        self.scratch.moments[1] = var
        plgpu.commit_smem()
        for i, ref in enumerate((self.operands.mean, self.operands.var)):
            for group in range(GROUPS):
                ref[row, self.first_group + group] = self.scratch.moments[i, group]

    def run(self, rows_per_block: int) -> None:
        tables = self.operands.tables
        columns = (tables.q_re, tables.q_im, tables.p, tables.g_re, tables.g_im)
        loaded = [[self.load(table, n) for table in columns] for n in range(tables.p.shape[0])]

        def step(row, _):
            active = self.operands.active
            if active is None:
                self.update(row, loaded)
            else:
                pl.when(active[row] != 0)(lambda: self.update(row, loaded))
            # The next row overwrites the moments in shared memory.
            plgpu.commit_smem()
            return ()

        first = lax.axis_index("r") * rows_per_block
        last = jnp.minimum(first + rows_per_block, self.operands.x.shape[0])
        lax.fori_loop(first, last, step, ())


# Layers share one compiled kernel, because `jit` traces it once.
@partial(jax.jit, static_argnums=(1, 2), static_argnames="interpret")
def launch_norm_state_step(
    operands: NormStateOperands, eps: float, rows_per_block: int, *, interpret: Any
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """Runs the kernel and returns u and y.

    Args:
      operands: arrays; state, mean and var from `jax.new_ref`, of which rows 0..B-1 are updated.
      eps: added to the variance.
      rows_per_block: rows of a block.
      interpret: from `interpret_params`.
    """
    x = operands.x

    def kernel(operands: NormStateOperands, results: Any, scratch: NormStateScratch) -> None:
        u, y = results
        _NormStateKernelCall(operands, u, y, scratch, eps).run(rows_per_block)

    out = jax.ShapeDtypeStruct((x.shape[0], x.shape[1] * x.shape[2]), x.dtype)
    return launch(
        kernel,
        operands,
        (out, out),
        name="norm_state_step",
        grid={"r": pl.cdiv(x.shape[0], rows_per_block), "g": x.shape[1] // GROUPS},
        scratch=NormStateScratch(
            plgpu.SMEM((2, GROUPS), jnp.float32), plgpu.SMEM((2, GROUPS, x.shape[2]), x.dtype)
        ),
        interpret=interpret,
    )
