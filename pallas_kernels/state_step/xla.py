"""Steps of CEMA in plain JAX for any platform, on real and imaginary parts."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.common.target import find_target
from pallas_kernels.state_step.types import CemaStepTables, StateStepOutput


def state_step(
    x: Float[Array, "B D"],
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    active: Bool[Array, " B"] | None,
) -> StateStepOutput:
    """Elementwise, then a sum over orders. Arguments as in `api.state_step`."""
    # A loop over orders updates the state in place, and is cheap on a CPU alone.
    step = _step_by_orders if find_target().platform == "cpu" else _step_at_once
    y, state = step(x.astype(state.dtype), tables, state, active)
    return StateStepOutput(y.astype(x.dtype), state)


def state_steps(
    x: Float[Array, "B T D"],
    tables: CemaStepTables,
    state: Float[Array, "B 2N D"],
    counts: Int32[Array, " B"] | None = None,
) -> StateStepOutput:
    """T successive tokens of every row: the state's bits are those of T steps.

    Args:
      x: the tokens.
      tables: as in `api.state_step`.
      state: of B rows, before the first token.
      counts: tokens that change a row's state; the y of others has no meaning. None: all.
    """

    def step(
        state: Array, token: tuple[Float[Array, "B D"], Bool[Array, " B"] | None]
    ) -> tuple[Array, Array]:
        y, state = state_step(token[0], tables, state, token[1])
        return state, y

    T = x.shape[1]
    active = None if counts is None else jnp.arange(T)[:, None] < counts
    # On a CPU a step is a loop over orders, which many copies would only make slow to compile.
    # Elsewhere the compiler merges the tokens' steps.
    unroll = 1 if find_target().platform == "cpu" else T
    state, y = lax.scan(step, state, (x.swapaxes(0, 1), active), unroll=unroll)
    return StateStepOutput(y.swapaxes(0, 1), state)


def _step_at_once(
    x: Float[Array, "B D"], tables: CemaStepTables, state: Array, active: Array | None
) -> tuple[Array, Array]:
    rows, order = x.shape[0], tables.p.shape[0]
    y, *new = _advance(x, tables, state[:rows, :order], state[:rows, order:])
    joined = jnp.concatenate(new, axis=1)
    if active is not None:
        joined = jnp.where(active[:, None, None], joined, state[:rows])
    state = joined if rows == state.shape[0] else state.at[:rows].set(joined)
    return y + tables.omega * x, state


def _step_by_orders(
    x: Float[Array, "B D"], tables: CemaStepTables, state: Array, active: Array | None
) -> tuple[Array, Array]:
    rows, order = x.shape[0], tables.p.shape[0]
    shape = (rows, 1, x.shape[1])

    def step(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        y, state = carry
        of_order = CemaStepTables(
            *[
                table if name == "omega" else lax.dynamic_slice_in_dim(table, n, 1)
                for name, table in zip(CemaStepTables._fields, tables, strict=True)
            ]
        )
        starts = (n, n + order)
        old = [lax.dynamic_slice(state, (0, start, 0), shape) for start in starts]
        # Read before the first write: a fused read after it would make XLA copy the state.
        old = lax.optimization_barrier(old)
        term, *new = lax.optimization_barrier(_advance(x, of_order, *old))
        for start, new_part, old_part in zip(starts, new, old, strict=True):
            if active is not None:
                new_part = jnp.where(active[:, None, None], new_part, old_part)
            state = lax.dynamic_update_slice(state, new_part, (0, start, 0))
        return y + term, state

    return lax.fori_loop(0, order, step, (tables.omega * x, state))


def _advance(
    x: Float[Array, "B D"],
    tables: CemaStepTables,
    re: Float[Array, "B N D"],
    im: Float[Array, "B N D"],
) -> tuple[Array, Array, Array]:
    """The sum over orders of Re(g h) after the step, and h's two parts."""
    new_re = tables.q_re * re - tables.q_im * im + tables.p * x[:, None]
    new_im = tables.q_re * im + tables.q_im * re
    return jnp.sum(tables.g_re * new_re - tables.g_im * new_im, axis=1), new_re, new_im
