"""TimestepNorm and CEMA token by token, CEMA by its definition in complex numbers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.norm_state_step import xla
from pallas_kernels.norm_state_step.types import (
    Counts,
    NormStateStepOutput,
    StepNorm,
    TargetRows,
)
from pallas_kernels.state_step import CemaStepTables
from pallas_kernels.timestep_norm import TimestepNormState


def norm_state_step(
    x: Float[Array, "B D"],
    norm: StepNorm,
    norm_state: TimestepNormState,
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    active: Bool[Array, " B"] | None,
) -> NormStateStepOutput:
    """The definition in `api.norm_state_step`."""
    return xla.norm_state_step(
        x, norm, norm_state, tables, state, active, implementation="reference"
    )


def norm_state_steps(
    x: Float[Array, "B T D"],
    norm: StepNorm,
    norm_state: TimestepNormState,
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    counts: Counts = None,
    target: TargetRows | None = None,
) -> NormStateStepOutput:
    """The definition in `api.norm_state_steps`: two loops, all tokens and the counted ones."""
    B, T = x.shape[:2]
    outputs = []
    fed_norm, fed_state, kept_norm, kept_state = norm_state, state, norm_state, state
    for t in range(T):
        u, y, fed_norm, fed_state = norm_state_step(
            x[:, t], norm, fed_norm, tables, fed_state, None
        )
        outputs.append((u, y))
        active = None if counts is None else t < jnp.broadcast_to(counts, B)
        _, _, kept_norm, kept_state = norm_state_step(
            x[:, t], norm, kept_norm, tables, kept_state, active
        )
    u, y = (jnp.stack(each, axis=1) for each in zip(*outputs, strict=True))
    if target is None:
        return NormStateStepOutput(u, y, kept_norm, kept_state)
    new_norm = jax.tree.map(lambda field: field[:B], kept_norm)
    moved = xla.put_states(norm_state, state, new_norm, kept_state[:B], target)
    return NormStateStepOutput(u, y, *moved)
