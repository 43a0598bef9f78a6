"""TimestepNorm over a sequence that is split over devices."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common import context_parallel
from pallas_kernels.timestep_norm.types import (
    TimestepNormOutput,
    TimestepNormState,
    before_rows,
    moments_dtype,
)


class Links(NamedTuple):
    """How moments pass from part to part.

    Attributes:
      parts: documents of all parts, leading axis S.
      mean: of every part's last document there.
      var: likewise.
    """

    parts: context_parallel.LocalDocuments
    mean: Float[Array, "S B G"]
    var: Float[Array, "S B G"]


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
    part = context_parallel.local_documents(segment_ids, rows, length)
    is_last = jnp.ones((rows, length), bool)
    if segment_ids is not None:
        is_last = (segment_ids == part.last[:, None]) & (segment_ids != 0)
    groups = x.astype(moments_dtype(x.dtype)).reshape(rows, length, num_groups, -1)
    weight = is_last[..., None, None]
    size = jnp.maximum(part.num_tokens, 1)[:, None] * (width // num_groups)
    mean = jnp.sum(jnp.where(weight, groups, 0), axis=(1, 3)) / size
    apart = jnp.where(weight, groups - mean[:, None, :, None], 0)
    var = jnp.sum(jnp.square(apart), axis=(1, 3)) / size
    return run(enter(part, mean, var, prior, axis)[0])


def enter(
    part: context_parallel.LocalDocuments,
    mean: Float[Array, "B G"],
    var: Float[Array, "B G"],
    prior: TimestepNormState,
    axis: str,
) -> tuple[TimestepNormState, Links]:
    """The moments before this device's tokens, from what every device finds of its own alone.

    Args:
      part: this device's documents.
      mean: of the last document's tokens here.
      var: likewise.
      prior: what every document starts from.
      axis: mesh axis over which the sequence is split.
    """
    parts, (means, variances) = context_parallel.all_gather_summaries(part, (mean, var), axis)
    links = Links(parts, means, variances)
    nothing = jnp.zeros_like(means), jnp.zeros_like(variances)
    return _fold(links, prior, nothing, axis), links


def enter_backward(
    links: Links,
    prior: TimestepNormState,
    d_mean: Float[Array, "B G"],
    d_var: Float[Array, "B G"],
    axis: str,
) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
    """From gradients of the moments before every part to those of the moments after it.

    One reduce-scatter, the mirror of the gather.
    """

    def entering(mean: Array, var: Array) -> tuple[Array, Array]:
        return _fold(links, prior, (mean, var), axis)[1:]

    nothing = jnp.zeros_like(links.mean), jnp.zeros_like(links.var)
    of_all = jnp.stack(jax.vjp(entering, *nothing)[1]((d_mean, d_var)), axis=1)
    own = jax.lax.psum_scatter(of_all, axis, scatter_dimension=0)
    return own[0], own[1]


def _fold(
    links: Links, prior: TimestepNormState, changes: tuple[Array, Array], axis: str
) -> TimestepNormState:
    """What this part's first document starts from, had the moments after every part changed so."""

    def append(before: TimestepNormState, summary, number: int) -> TimestepNormState:
        mean, var, more_mean, more_var = summary
        tokens = links.parts.num_tokens[number]
        count = before.count + tokens
        share = (tokens / jnp.maximum(count, 1)).astype(mean.dtype)[:, None]
        step = mean - before.mean
        merged = (1 - share) * before.var + share * var + (1 - share) * share * step**2
        return TimestepNormState(count, before.mean + share * step + more_mean, merged + more_var)

    fresh = before_rows(prior, links.mean.shape[1])
    summaries = links.mean, links.var, *changes
    return context_parallel.exclusive_fold(links.parts, summaries, fresh, append, axis)
