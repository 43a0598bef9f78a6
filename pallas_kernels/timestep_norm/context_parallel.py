"""TimestepNorm under context parallelism: every device holds one sequence shard of each row."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.context_parallel import (
    LocalDocuments,
    all_gather_summaries,
    exclusive_fold,
    exclusive_fold_vjp,
    local_documents,
)
from pallas_kernels.timestep_norm.types import (
    MeanVar,
    TimestepNormOutput,
    TimestepNormState,
    broadcast_to_rows,
    moments_dtype,
)


class ShardMoments(NamedTuple):
    """Moments of the last document's tokens in every sequence shard, gathered; S shards.

    Attributes:
      documents: documents of all shards, leading axis S.
      mean: mean of those tokens.
      var: their population variance.
    """

    documents: LocalDocuments
    mean: Float[Array, "S B G"]
    var: Float[Array, "S B G"]


def with_sequence_axis(
    normalize: Callable[..., TimestepNormOutput],
) -> Callable[..., TimestepNormOutput]:
    """Adds a last argument `sequence_axis` to an implementation that knows whole rows only.

    With a mesh axis, two passes over x find the shard's own moments, and `incoming_state` replaces
    the initial state.
    """

    @functools.wraps(normalize)
    def normalize_shard(
        x, scale, bias, num_groups, eps, initial_state, prior, segment_ids, sequence_axis
    ):
        if sequence_axis is not None:
            documents = local_documents(segment_ids, *x.shape[:2])
            mean, var = _last_document_moments(x, num_groups, segment_ids, documents)
            initial_state, _ = incoming_state(documents, mean, var, prior, sequence_axis)
        return normalize(x, scale, bias, num_groups, eps, initial_state, prior, segment_ids)

    return normalize_shard


def _last_document_moments(
    x: Float[Array, "B L D"],
    num_groups: int,
    segment_ids: Int32[Array, "B L"] | None,
    documents: LocalDocuments,
) -> MeanVar:
    """Mean and variance of the last document's tokens in this shard."""
    rows, length, width = x.shape
    in_last = jnp.ones((rows, length), bool)
    if segment_ids is not None:
        in_last = (segment_ids == documents.last[:, None]) & (segment_ids != 0)
    groups = x.astype(moments_dtype(x.dtype)).reshape(rows, length, num_groups, -1)
    in_last = in_last[..., None, None]
    size = jnp.maximum(documents.num_tokens, 1)[:, None] * (width // num_groups)
    mean = jnp.sum(jnp.where(in_last, groups, 0), axis=(1, 3)) / size
    deviation = jnp.where(in_last, groups - mean[:, None, :, None], 0)
    return mean, jnp.sum(jnp.square(deviation), axis=(1, 3)) / size


def incoming_state(
    documents: LocalDocuments,
    mean: Float[Array, "B G"],
    var: Float[Array, "B G"],
    prior: TimestepNormState,
    axis: str,
) -> tuple[TimestepNormState, ShardMoments]:
    """The state before this shard's first token, and the gathered moments for the backward pass.

    One all-gather, then an exclusive fold by Chan's rule.

    Args:
      documents: documents of this shard.
      mean: mean of the last document's tokens in this shard.
      var: variance of those tokens.
      prior: the state that every document starts from.
      axis: name of the mesh axis.
    """
    gathered, (means, variances) = all_gather_summaries(documents, (mean, var), axis)
    shards = ShardMoments(gathered, means, variances)
    zeros = jnp.zeros_like(means), jnp.zeros_like(variances)
    return _fold(shards, prior, zeros, axis), shards


def incoming_state_vjp(
    shards: ShardMoments,
    prior: TimestepNormState,
    d_mean: Float[Array, "B G"],
    d_var: Float[Array, "B G"],
    axis: str,
) -> MeanVar:
    """Gradients of the moments after this shard, from those of every shard's incoming state.

    One reduce-scatter, the transpose of the all-gather.

    Args:
      shards: from `incoming_state`.
      prior: the state that every document starts from.
      d_mean: gradient of this shard's incoming mean.
      d_var: gradient of this shard's incoming variance.
      axis: name of the mesh axis.
    """

    def perturbed_state(perturbations: MeanVar) -> MeanVar:
        return _fold(shards, prior, perturbations, axis)[1:]

    zeros = jnp.zeros_like(shards.mean), jnp.zeros_like(shards.var)
    return exclusive_fold_vjp(perturbed_state, zeros, (d_mean, d_var), axis)


def _fold(
    shards: ShardMoments,
    prior: TimestepNormState,
    perturbations: tuple[Array, Array],
    axis: str,
) -> TimestepNormState:
    """The incoming state if the mean and variance after every shard are perturbed."""

    def combine(before: TimestepNormState, summary, index: int) -> TimestepNormState:
        mean, var, mean_change, var_change = summary
        tokens = shards.documents.num_tokens[index]
        count = before.count + tokens
        share = (tokens / jnp.maximum(count, 1)).astype(mean.dtype)[:, None]
        step = mean - before.mean
        merged = (1 - share) * before.var + share * var + (1 - share) * share * step**2
        return TimestepNormState(
            count, before.mean + share * step + mean_change, merged + var_change
        )

    empty_state = broadcast_to_rows(prior, shards.mean.shape[1])
    summaries = shards.mean, shards.var, *perturbations
    return exclusive_fold(shards.documents, summaries, empty_state, combine, axis)
