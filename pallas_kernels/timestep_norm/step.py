"""One token of TimestepNorm a row, for decoding: no loop, and nothing kept for gradients."""

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
    B, D = x.shape
    groups = x.astype(moments_dtype(x.dtype)).reshape(B, num_groups, D // num_groups)
    # Both sums in one pass. Differences from a member of the group do not cancel.
    pivot = groups[..., 0]
    differences = groups - pivot[..., None]
    mean_difference = differences.mean(-1)
    var = jnp.square(differences).mean(-1) - jnp.square(mean_difference)
    state = merge_moments(state, pivot + mean_difference, jnp.maximum(var, 0))
    y = (groups - state.mean[..., None]) * jax.lax.rsqrt(state.var + eps)[..., None]
    y = y.reshape(B, D)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return TimestepNormOutput(y.astype(x.dtype), state)
