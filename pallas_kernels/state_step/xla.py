"""A step of CEMA in plain JAX for any platform, on real and imaginary parts."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.state_step.types import CemaStepTables, StateStepOutput


def state_step(
    x: Float[Array, "B D"],
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    active: Bool[Array, " B"] | None,
) -> StateStepOutput:
    """Elementwise, then a sum over orders. Arguments as in `api.state_step`."""
    rows, order = x.shape[0], tables.p.shape[0]
    wide = x.astype(state.dtype)
    re, im = state[:rows, :order], state[:rows, order:]
    new_re = tables.q_re * re - tables.q_im * im + tables.p * wide[:, None]
    new_im = tables.q_re * im + tables.q_im * re
    y = jnp.sum(tables.g_re * new_re - tables.g_im * new_im, axis=1) + tables.omega * wide
    new = jnp.concatenate([new_re, new_im], axis=1)
    if active is not None:
        new = jnp.where(active[:, None, None], new, state[:rows])
    if rows < state.shape[0]:
        new = state.at[:rows].set(new)
    return StateStepOutput(y.astype(x.dtype), new)
