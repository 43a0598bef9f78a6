"""Inputs and results that all implementations of TimestepNorm share.

B batch, L length, D model width, G groups of F = D/G features.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

# Mean and variance, or their gradients.
MeanVar = tuple[Float[Array, "*B G"], Float[Array, "*B G"]]


class TimestepNormState(NamedTuple):
    """Moments of all numbers so far; float32, or float64 if x is. A prior has no batch axis.

    Attributes:
      count: tokens so far, at least 0; each stands for D/G numbers in every group.
      mean: mean of a group's numbers; ignored where count is 0.
      var: population variance of a group's numbers; ignored where count is 0.
    """

    count: Int32[Array, " *B"]
    mean: Float[Array, "*B G"]
    var: Float[Array, "*B G"]


class TimestepNormOutput(NamedTuple):
    """Result of `timestep_norm`.

    Attributes:
      y: normalized input, 0 at padding, dtype of x.
      final_state: moments after the row's last token that is not padding.
    """

    y: Float[Array, "B L D"]
    final_state: TimestepNormState


def merge_token(state: TimestepNormState, x: Float[Array, "B G F"]) -> TimestepNormState:
    """The moments with one more token of every row; x has their dtype."""
    mean = x.mean(-1)
    return merge_moments(state, mean, jnp.square(x - mean[..., None]).mean(-1))


def merge_moments(
    state: TimestepNormState, mean: Float[Array, "B G"], var: Float[Array, "B G"]
) -> TimestepNormState:
    """The moments with one more token of every row, given its own (Chan et al. 1979)."""
    count = state.count + 1
    share = (1 / count.astype(mean.dtype))[:, None]
    shift = mean - state.mean
    return TimestepNormState(
        count,
        state.mean + shift * share,
        (1 - share) * (state.var + share * jnp.square(shift)) + share * var,
    )


def broadcast_to_rows(prior: TimestepNormState, num_rows: int) -> TimestepNormState:
    """The initial state of `num_rows` rows whose first documents start from the prior."""

    def broadcast(field: Any) -> Any:
        # A field that is known while tracing stays known; the other fields may be traced. An
        # exported program may have a number of rows that is not an int.
        by = np if isinstance(field, np.ndarray) and isinstance(num_rows, int) else jnp
        return by.broadcast_to(field, (num_rows, *field.shape))

    return TimestepNormState(*map(broadcast, prior))


def empty_prior(num_groups: int, dtype: jnp.dtype) -> TimestepNormState:
    """A prior of no tokens, in numpy arrays: `is_known_empty`."""
    count: Any = np.zeros((), np.int32)
    moments: Any = np.zeros(num_groups, dtype)
    return TimestepNormState(count, moments, moments)


def is_known_empty(state: TimestepNormState) -> bool:
    """Whether a state of no tokens is known as such when the program is traced."""
    return isinstance(state.count, np.ndarray) and not state.count.any()


def moments_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of moments: float32, or float64 for float64 input."""
    return jnp.promote_types(dtype, jnp.float32)
