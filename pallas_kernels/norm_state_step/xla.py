"""TimestepNorm and CEMA of one or a few tokens a row in plain JAX, one after the other."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.norm_state_step.types import (
    Counts,
    NormStateStepOutput,
    StepNorm,
    TargetRows,
)
from pallas_kernels.state_step import CemaStepTables, state_step
from pallas_kernels.state_step.xla import state_steps
from pallas_kernels.timestep_norm import (
    TimestepNormState,
    timestep_norm_step,
    timestep_norm_steps,
)


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


def norm_state_steps(
    x: Float[Array, "B T D"],
    norm: StepNorm,
    norm_state: TimestepNormState,
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    counts: Counts = None,
    target: TargetRows | None = None,
) -> NormStateStepOutput:
    """TimestepNorm of all tokens, then CEMA token by token. Arguments as in `api`."""
    B = x.shape[0]
    u, moments = norm_steps(x, norm, norm_state)
    y, new_state = state_steps(u, tables, state[:B])
    if isinstance(counts, int):
        return NormStateStepOutput(u, y, norm_state, state)
    if counts is None:
        new_norm = jax.tree.map(lambda field: field[:, -1], moments)
    else:
        new_norm = moments_after(counts, norm_state, moments)
        # Tokens behind the counted ones change y and not the state: a scan of their own, which
        # callers without use for y do not pay for.
        _, new_state = state_steps(u, tables, state[:B], counts)
    return NormStateStepOutput(u, y, *put_states(norm_state, state, new_norm, new_state, target))


def norm_steps(
    x: Float[Array, "B T D"], norm: StepNorm, state: TimestepNormState
) -> tuple[Float[Array, "B T D"], TimestepNormState]:
    """TimestepNorm of T tokens of each of the first B rows, and the moments after each token."""
    return timestep_norm_steps(
        x,
        norm.scale,
        norm.bias,
        num_groups=norm.num_groups,
        eps=norm.eps,
        state=TimestepNormState(*(field[: x.shape[0]] for field in state)),
    )


def moments_after(
    counts: Int32[Array, " B"], before: TimestepNormState, moments: TimestepNormState
) -> TimestepNormState:
    """The moments of the first B rows after `counts` tokens.

    Args:
      counts: 0 to T.
      before: moments of S >= B rows before the first token.
      moments: from `norm_steps`.
    """
    B = len(counts)

    def select(before: Array, after: Array) -> Array:
        fields = jnp.concatenate([before[:B, None], after], axis=1)
        index = counts.reshape(B, *[1] * (fields.ndim - 1))
        return jnp.take_along_axis(fields, index, axis=1)[:, 0]

    return jax.tree.map(select, before, moments)


def put_states(
    norm_state: TimestepNormState,
    state: Float[Array, "S 2N D"],
    new_norm: TimestepNormState,
    new_state: Float[Array, "B 2N D"],
    target: TargetRows | None,
) -> tuple[TimestepNormState, Float[Array, "S 2N D"]]:
    """The first B rows, or those of the target, replaced by the new ones."""
    if target is None:
        return jax.tree.map(_set_rows, (norm_state, state), (new_norm, new_state))
    put = partial(_put_rows, first_row=target.first_row)
    return jax.tree.map(put, (target.norm, target.state), (new_norm, new_state))


def count_tokens(
    before: Int32[Array, " S"], fed: Int32[Array, " B"] | int, B: int, target: TargetRows | None
) -> Int32[Array, " S"]:
    """TimestepNorm's counts of tokens in the result, after `fed` more tokens of B rows."""
    new = before[:B] + fed
    if target is None:
        return _set_rows(before, new)
    return _put_rows(target.norm.count, new, target.first_row)


def _select(rows: Bool[Array, " B"], new: Array, old: Array) -> Array:
    return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _set_rows(old: Array, new: Array) -> Array:
    return new if new.shape == old.shape else old.at[: new.shape[0]].set(new)


def _put_rows(
    old: Shaped[Array, "S *d"], new: Shaped[Array, "B *d"], first_row: Int32[Array, ""] | int
) -> Shaped[Array, "S *d"]:
    return jax.lax.dynamic_update_slice_in_dim(old, new, first_row, 0)
