"""One or a few tokens of TimestepNorm a row, for decoding: nothing kept for gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.timestep_norm.types import (
    TimestepNormOutput,
    TimestepNormState,
    merge_moments,
    moments_dtype,
)


def timestep_norm_step(
    x: Float[Array, "B D"],
    scale: Float[Array, " D"] | None,
    bias: Float[Array, " D"] | None,
    *,
    num_groups: int,
    eps: float,
    state: TimestepNormState,
) -> TimestepNormOutput:
    """`timestep_norm` of one token a row, in plain JAX on every platform.

    Args:
      x: one token of every row.
      scale: multiplies the normalized token; None: 1.
      bias: added to it; None: 0.
      num_groups: groups G; divides D.
      eps: added to the variance.
      state: moments of the tokens before.

    Returns:
      The normalized tokens (B, D) in x's dtype, and the moments with them.
    """
    groups = _split_groups(x, num_groups)
    state = merge_moments(state, *_token_moments(groups))
    y = _normalize(groups, state, scale, bias, eps)
    return TimestepNormOutput(y.astype(x.dtype), state)


class TimestepNormSteps(NamedTuple):
    """Result of `timestep_norm_steps`.

    Attributes:
      y: normalized tokens, in x's dtype.
      states: the moments after each token: fields (B, T) and (B, T, G).
    """

    y: Float[Array, "B T D"]
    states: TimestepNormState


def timestep_norm_steps(
    x: Float[Array, "B T D"],
    scale: Float[Array, " D"] | None,
    bias: Float[Array, " D"] | None,
    *,
    num_groups: int,
    eps: float,
    state: TimestepNormState,
) -> TimestepNormSteps:
    """T calls of `timestep_norm_step`, for a small T: the loop over tokens is written out.

    Args:
      x: T successive tokens of every row.
      scale: as in `timestep_norm_step`, and so are the others.
      bias: see there.
      num_groups: see there.
      eps: see there.
      state: moments of the tokens before, fields (B,) and (B, G).
    """
    groups = _split_groups(x, num_groups)
    mean, var = _token_moments(groups)
    states = []
    for t in range(x.shape[1]):
        state = merge_moments(state, mean[:, t], var[:, t])
        states.append(state)
    stacked = jax.tree.map(lambda *fields: jnp.stack(fields, axis=1), *states)
    y = _normalize(groups, stacked, scale, bias, eps)
    return TimestepNormSteps(y.astype(x.dtype), stacked)


def _split_groups(x: Float[Array, "*b D"], num_groups: int) -> Float[Array, "*b G F"]:
    return x.astype(moments_dtype(x.dtype)).reshape(*x.shape[:-1], num_groups, -1)


def _token_moments(
    groups: Float[Array, "*b G F"],
) -> tuple[Float[Array, "*b G"], Float[Array, "*b G"]]:
    """Mean and variance of one token's numbers."""
    # Both sums in one pass. Differences from a member of the group do not cancel.
    pivot = groups[..., 0]
    differences = groups - pivot[..., None]
    mean_difference = differences.mean(-1)
    var = jnp.square(differences).mean(-1) - jnp.square(mean_difference)
    return pivot + mean_difference, jnp.maximum(var, 0)


def _normalize(
    groups: Float[Array, "*b G F"],
    state: TimestepNormState,
    scale: Float[Array, " D"] | None,
    bias: Float[Array, " D"] | None,
    eps: float,
) -> Float[Array, "*b D"]:
    y = (groups - state.mean[..., None]) * jax.lax.rsqrt(state.var + eps)[..., None]
    y = y.reshape(*groups.shape[:-2], -1)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias
