"""A step of CEMA by its definition, in complex numbers; complex128-capable."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.state_step.tables import pack_state, unpack_state
from pallas_kernels.state_step.types import CemaStepTables, StateStepOutput


def state_step(
    x: Float[Array, "B D"],
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    active: Bool[Array, " B"] | None,
) -> StateStepOutput:
    """The definition in `api.state_step`."""
    q = jax.lax.complex(tables.q_re, tables.q_im).T
    gamma = jax.lax.complex(tables.g_re, tables.g_im).T
    wide = x.astype(state.dtype)
    h = q * unpack_state(state[: x.shape[0]]) + tables.p.T * wide[..., None]
    y = jnp.sum((gamma * h).real, axis=-1) + tables.omega * wide
    new = pack_state(h)
    if active is not None:
        new = jnp.where(active[:, None, None], new, state[: x.shape[0]])
    return StateStepOutput(y.astype(x.dtype), jnp.concatenate([new, state[x.shape[0] :]]))
