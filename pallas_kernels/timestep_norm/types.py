"""What goes into and comes out of TimestepNorm, whichever implementation runs.

B batch, L length, D model width, G groups of D/G features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


class TimestepNormState(NamedTuple):
    """Moments of all numbers seen; float32, or float64 if x is. A prior has no batch axis.

    Attributes:
      count: tokens seen, at least 0; each stands for D/G numbers in every group.
      mean: mean of a group's numbers. Means nothing where count is 0.
      var: population variance of a group's numbers. Means nothing where count is 0.
    """

    count: Int32[Array, " *B"]
    mean: Float[Array, "*B G"]
    var: Float[Array, "*B G"]


class TimestepNormOutput(NamedTuple):
    """Result of `timestep_norm`.

    Attributes:
      y: normalized input, 0 at padding, dtype of x.
      final_state: moments after the row's last non-padding token.
    """

    y: Float[Array, "B L D"]
    final_state: TimestepNormState


def before_rows(prior: TimestepNormState, rows: int) -> TimestepNormState:
    """The moments before the first token of so many rows, each of which starts from the prior."""
    return TimestepNormState(*(jnp.broadcast_to(part, (rows, *part.shape)) for part in prior))


def moments_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of moments: float32, or float64 for float64 input."""
    return jnp.promote_types(dtype, jnp.float32)


def document_starts(segment_ids: Int32[Array, "B L"]) -> Bool[Array, "B L"]:
    """True at the first token of every document; padding in a document does not start a new one."""
    # Ids grow along a row, so the largest one before a token is the last one before it.
    seen = jax.lax.cummax(segment_ids, axis=1)
    before = jnp.pad(seen[:, :-1], ((0, 0), (1, 0)))
    return (segment_ids != 0) & (segment_ids != before)
