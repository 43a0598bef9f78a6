"""TimestepNorm over a sequence that is split over devices."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import sequence_parts
from pallas_kernels.timestep_norm.interface import (
    TimestepNormOutput,
    TimestepNormState,
    moments_dtype,
)


def timestep_norm_of_part(
    x: Float[Array, "B L D"],
    num_groups: int,
    prior: TimestepNormState,
    segment_ids: Int32[Array, "B L"] | None,
    axis: str,
    run: Callable[[TimestepNormState], TimestepNormOutput],
) -> TimestepNormOutput:
    """Outputs of this device's tokens, the sequence going on from part to part along `axis`.

    Args:
      x: this device's tokens.
      num_groups: groups G.
      prior: what every document starts from.
      segment_ids: documents, numbered along whole rows.
      axis: mesh axis over which the sequence is split.
      run: TimestepNorm of this part from a state.
    """
    rows, length, width = x.shape
    part = sequence_parts.describe(segment_ids, rows, length)
    is_last = jnp.ones((rows, length), bool)
    if segment_ids is not None:
        is_last = (segment_ids == part.last[:, None]) & (segment_ids != 0)
    groups = x.astype(moments_dtype(x.dtype)).reshape(rows, length, num_groups, -1)
    weight = is_last[..., None, None]
    size = jnp.maximum(part.tokens, 1)[:, None] * (width // num_groups)
    mean = jnp.sum(jnp.where(weight, groups, 0), axis=(1, 3)) / size
    apart = jnp.where(weight, groups - mean[:, None, :, None], 0)
    var = jnp.sum(jnp.square(apart), axis=(1, 3)) / size
    parts, (means, variances) = sequence_parts.gather(part, (mean, var), axis)

    def append(before: TimestepNormState, summary, number: int) -> TimestepNormState:
        tokens = parts.tokens[number]
        count = before.count + tokens
        share = (tokens / jnp.maximum(count, 1)).astype(mean.dtype)[:, None]
        step = summary[0] - before.mean
        merged = (1 - share) * before.var + share * summary[1] + (1 - share) * share * step**2
        return TimestepNormState(count, before.mean + share * step, merged)

    fresh = TimestepNormState(
        jnp.broadcast_to(prior.count, (rows,)),
        jnp.broadcast_to(prior.mean, (rows, num_groups)),
        jnp.broadcast_to(prior.var, (rows, num_groups)),
    )
    return run(sequence_parts.fold(parts, (means, variances), fresh, append, axis))
