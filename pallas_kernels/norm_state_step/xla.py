"""TimestepNorm and CEMA of one token a row in plain JAX, one after the other."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.norm_state_step.types import NormStateStepOutput, StepNorm
from pallas_kernels.state_step import CemaStepTables, state_step
from pallas_kernels.timestep_norm import TimestepNormState, timestep_norm_step


def norm_state_step(
    x: Float[Array, "B D"],
    norm: StepNorm,
    norm_state: TimestepNormState,
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    active: Bool[Array, " B"] | None,
    *,
    implementation: Implementation | None = "xla",
) -> NormStateStepOutput:
    """Two operations, of which CEMA's has the given implementation. Arguments as in `api`."""
    u, new_norm = norm_step(x, norm, norm_state, active)
    y, state = state_step(u, tables, state, active, implementation=implementation)
    return NormStateStepOutput(u, y, new_norm, state)


def norm_step(
    x: Float[Array, "B D"],
    norm: StepNorm,
    state: TimestepNormState,
    active: Bool[Array, " B"] | None,
) -> tuple[Float[Array, "B D"], TimestepNormState]:
    """TimestepNorm of one token of each of the first B rows of a state; others stay."""
    B = x.shape[0]
    old = TimestepNormState(*(field[:B] for field in state))
    y, new = timestep_norm_step(
        x, norm.scale, norm.bias, num_groups=norm.num_groups, eps=norm.eps, state=old
    )
    if active is not None:
        new = jax.tree.map(partial(_select, active), new, old)
    return y, TimestepNormState(*map(_set_rows, state, new))


def _select(rows: Bool[Array, " B"], new: Array, old: Array) -> Array:
    return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _set_rows(old: Array, new: Array) -> Array:
    return new if new.shape == old.shape else old.at[: new.shape[0]].set(new)
