"""TimestepNorm by its definition: a loop over tokens, each merged into the running moments."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.timestep_norm.positions import document_starts
from pallas_kernels.timestep_norm.types import (
    TimestepNormOutput,
    TimestepNormState,
    merge_token,
    moments_dtype,
)


def timestep_norm(
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    num_groups: int,
    eps: float,
    initial_state: TimestepNormState,
    prior: TimestepNormState,
    segment_ids: Int32[Array, "B L"] | None,
) -> TimestepNormOutput:
    """The definition, token by token (merge of Chan et al. 1979). Arguments as in `api.py`."""
    B, L, D = x.shape
    if segment_ids is None:
        segment_ids = jnp.ones((B, L), jnp.int32)
    starts = document_starts(segment_ids)
    # The row's first document continues `initial_state`; the others start from the prior.
    resets = starts & (jnp.cumsum(starts, axis=1) > 1)
    groups = x.astype(moments_dtype(x.dtype)).reshape(B, L, num_groups, D // num_groups)

    def step(state, token):
        x, valid, reset = token
        state = _where(reset, prior, state)
        state = _where(valid, merge_token(state, x), state)
        y = (x - state.mean[..., None]) * jax.lax.rsqrt(state.var + eps)[..., None]
        return state, y

    tokens = (groups, segment_ids != 0, resets)
    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens)
    final_state, y = jax.lax.scan(step, initial_state, tokens)
    y = jnp.moveaxis(y, 0, 1).reshape(B, L, D) * scale + bias
    y = jnp.where((segment_ids != 0)[..., None], y, 0).astype(x.dtype)
    return TimestepNormOutput(y, final_state)


def _where(condition: Array, new: TimestepNormState, old: TimestepNormState) -> TimestepNormState:
    return TimestepNormState(
        jnp.where(condition, new.count, old.count),
        jnp.where(condition[:, None], new.mean, old.mean),
        jnp.where(condition[:, None], new.var, old.var),
    )
