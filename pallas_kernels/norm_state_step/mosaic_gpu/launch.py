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


class NormStates(NamedTuple):
    """States of rows: arrays, or references that the kernel updates.

    Attributes:
      state: (S, 2N, G, F) float32.
      mean: (S, G) float32.
      var: (S, G) float32.
    """

    state: Any
    mean: Any
    var: Any


class NormStateOperands(NamedTuple):
    """Operands of the kernel: arrays, or references in the kernel; channels as (G, F).

    Attributes:
      x: (B, T, G, F) bfloat16.
      scale: (G, F) float32, or None.
      bias: (G, F) float32, or None.
      tables: (N, G, F) float32.
      states: before the first token; with neither `target` nor `writes_nothing`, references whose
        rows 0..B-1 take the states after it.
      count: (S,) int32, tokens with the first one.
      active: (B,) int32, 0 for rows without results; None: all rows.
      counts: (B,) int32, tokens after which the states are kept, 0..T; None: T.
      target: references that take the next states; None: `states`.
      first_row: (1,) int32, row of `target` for row 0; None with `states`.
    """

    x: Any
    scale: Any
    bias: Any
    tables: CemaStepTables
    states: NormStates
    count: Any
    active: Any = None
    counts: Any = None
    target: NormStates | None = None
    first_row: Any = None


class NormStateScratch(NamedTuple):
    """Shared memory.

    Attributes:
      moments: (2, 4) float32, new means and variances.
      outputs: (2, T, 4, F), u and y: a thread stores fewer bytes of its tile than a store needs.
    """

    moments: Any
    outputs: Any


class _Constants(NamedTuple):
    """Registers of all rows: tables by order, and vectors, which may be None."""

    tables: list[list[Any]]
    scale: Any
    bias: Any
    omega: Any


class _Carry(NamedTuple):
    """Registers between two tokens of a row: the next token, and the states before it."""

    x: Any
    state: list[tuple[Any, Any]]
    mean: Any
    var: Any


class _NormStateKernelCall(NamedTuple):
    operands: NormStateOperands
    u: Any
    y: Any
    scratch: NormStateScratch
    eps: float
    writes_nothing: bool

    @property
    def num_tokens(self) -> int:
        return self.operands.x.shape[1]

    @property
    def size(self) -> int:
        """Channels of a group."""
        return self.operands.x.shape[3]

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

    def update(self, row: Any, constants: _Constants) -> None:
        """All tokens of a row."""
        states = self.operands.states
        order = self.operands.tables.p.shape[0]
        # All loads come before the first store, which the compiler could not move them over.
        state = [
            (self.load(states.state, row, n), self.load(states.state, row, order + n))
            for n in range(order)
        ]
        moments = (self.load_moments(ref, row) for ref in (states.mean, states.var))
        carry = _Carry(self.load(self.operands.x, row, 0), state, *moments)
        if self.operands.target is not None:
            # Another row takes the states also if they are those before the first token.
            pl.when(self.num_kept(row) == 0)(lambda: self.store_states(row, carry))
        feed = partial(self.feed, row, constants)
        if self.num_tokens == 1:
            feed(0, carry)
        else:
            lax.fori_loop(0, self.num_tokens, feed, carry)
        plgpu.commit_smem()
        self.store_outputs(row)
        if self.writes_nothing:
            return
        has_moments = self.num_kept(row) > 0 if self.operands.target is None else True
        pl.when(has_moments)(lambda: self.store_moments(row))

    def num_kept(self, row: Any) -> Any:
        """Tokens after which a row's states are kept."""
        counts = self.operands.counts
        return jnp.int32(self.num_tokens) if counts is None else counts[row]

    def feed(self, row: Any, constants: _Constants, t: Any, carry: _Carry) -> _Carry:
        """One token: u and y in shared memory, and the states if they are kept after it."""
        x, state, mean, var = carry
        next_x = x
        if self.num_tokens > 1:
            # Loaded a token ahead; after the last token it is loaded once more.
            next_x = self.load(self.operands.x, row, jnp.minimum(t + 1, self.num_tokens - 1))
        u, mean, var = self.normalize(x, mean, var, self.operands.count[row] + t, constants)
        u = u.astype(self.u.dtype)
        self.scratch.outputs[0, t] = u
        y, state = self.average(u.astype(jnp.float32), constants, state)
        self.scratch.outputs[1, t] = y.astype(self.y.dtype)
        carry = _Carry(next_x, state, mean, var)
        if not self.writes_nothing:
            pl.when(self.num_kept(row) == t + 1)(lambda: self.store_states(row, carry))
        return carry

    def normalize(
        self, x: Any, mean: Any, var: Any, count: Any, constants: _Constants
    ) -> tuple[Any, Any, Any]:
        """TimestepNorm of a token, and the moments with it (Chan et al. 1979)."""
        share = 1.0 / count.astype(jnp.float32)
        token_mean = x.sum(axis=1) * (1 / self.size)
        centered = x - self.over_channels(token_mean)
        token_var = (centered * centered).sum(axis=1) * (1 / self.size)
        shift = token_mean - mean
        new_mean = mean + shift * share
        new_var = (1 - share) * (var + share * (shift * shift)) + share * token_var
        factor = lax.rsqrt(new_var + self.eps)
        u = (x - self.over_channels(new_mean)) * self.over_channels(factor)
        u = u if constants.scale is None else u * constants.scale
        u = u if constants.bias is None else u + constants.bias
        return u, new_mean, new_var

    def average(
        self, u: Any, constants: _Constants, state: list[tuple[Any, Any]]
    ) -> tuple[Any, list[tuple[Any, Any]]]:
        """CEMA of a normalized token, and the state after it."""
        y = constants.omega * u
        new = []
        for (q_re, q_im, p, g_re, g_im), (re, im) in zip(constants.tables, state, strict=True):
            new_re = q_re * re - q_im * im + p * u
            new_im = q_re * im + q_im * re
            y = y + g_re * new_re - g_im * new_im
            new.append((new_re, new_im))
        return y, new

    def target_row(self, row: Any) -> tuple[NormStates, Any]:
        """Where a row's next states go."""
        operands = self.operands
        if operands.target is None:
            return operands.states, row
        return operands.target, operands.first_row[0] + row

    def store_states(self, row: Any, carry: _Carry) -> None:
        """Stores CEMA's state, and moments in shared memory for `store_moments`."""
        target, row = self.target_row(row)
        order = len(carry.state)
        for n, (re, im) in enumerate(carry.state):
            target.state[row, n, self.groups] = re
            target.state[row, order + n, self.groups] = im
        self.scratch.moments[0] = carry.mean
        self.scratch.moments[1] = carry.var

    def store_moments(self, row: Any) -> None:
        """Stores moments one at a time: an array of few is less than the 32 bytes of a store."""
        target, row = self.target_row(row)
        for i, ref in enumerate((target.mean, target.var)):
            for group in range(GROUPS):
                ref[row, self.first_group + group] = self.scratch.moments[i, group]

    def store_outputs(self, row: Any) -> None:
        strided = plgpu.Layout.WG_STRIDED((GROUPS, self.size), vec_size=self.size // 32)
        tile = GROUPS * self.size
        channels = pl.ds(lax.axis_index("g") * tile, tile)

        def store(t, _=()):
            for i, ref in enumerate((self.u, self.y)):
                output = plgpu.load(self.scratch.outputs.at[i, t], layout=strided)
                ref[row, t, channels] = output.reshape(tile)
            return ()

        if self.num_tokens == 1:
            store(0)
        else:
            lax.fori_loop(0, self.num_tokens, store, ())

    def load_constants(self) -> _Constants:
        tables, vectors = self.operands.tables, (self.operands.scale, self.operands.bias)
        columns = (tables.q_re, tables.q_im, tables.p, tables.g_re, tables.g_im)
        by_order = [[self.load(table, n) for table in columns] for n in range(tables.p.shape[0])]
        scale, bias = (None if each is None else self.load(each) for each in vectors)
        return _Constants(by_order, scale, bias, self.load(tables.omega))

    def run(self, rows_per_block: int) -> None:
        constants = self.load_constants()

        def step(row, _):
            active = self.operands.active
            if active is None:
                self.update(row, constants)
            else:
                pl.when(active[row] != 0)(lambda: self.update(row, constants))
            # The next row overwrites outputs and moments in shared memory.
            plgpu.commit_smem()
            return ()

        first = lax.axis_index("r") * rows_per_block
        last = jnp.minimum(first + rows_per_block, self.operands.x.shape[0])
        lax.fori_loop(first, last, step, ())


# Layers share one compiled kernel, because `jit` traces it once.
@partial(jax.jit, static_argnums=(1, 2, 3), static_argnames="interpret")
def launch_norm_state_steps(
    operands: NormStateOperands,
    eps: float,
    rows_per_block: int,
    writes_nothing: bool = False,
    *,
    interpret: Any,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Runs the kernel and returns u and y.

    Args:
      operands: arrays; the states that are updated from `jax.new_ref`.
      eps: added to the variance.
      rows_per_block: rows of a block.
      writes_nothing: no states are updated.
      interpret: from `interpret_params`.
    """
    x = operands.x
    rows, tokens, groups, size = x.shape

    def kernel(operands: NormStateOperands, results: Any, scratch: NormStateScratch) -> None:
        u, y = results
        call = _NormStateKernelCall(operands, u, y, scratch, eps, writes_nothing)
        call.run(rows_per_block)

    out = jax.ShapeDtypeStruct((rows, tokens, groups * size), x.dtype)
    return launch(
        kernel,
        operands,
        (out, out),
        name="norm_state_step" if tokens == 1 else "norm_state_steps",
        grid={"r": pl.cdiv(rows, rows_per_block), "g": groups // GROUPS},
        scratch=NormStateScratch(
            plgpu.SMEM((2, GROUPS), jnp.float32),
            plgpu.SMEM((2, tokens, GROUPS, size), x.dtype),
        ),
        interpret=interpret,
    )
