"""TimestepNorm's GPU kernels under context parallelism.

The kernels that summarize splits summarize a whole sequence shard too, so no other pass reads x:

    forward    shard's moments -> incoming_state (one all-gather) -> outputs
    backward   shard's slopes -> incoming_state_vjp (one reduce-scatter) -> gradients
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.context_parallel import local_documents
from pallas_kernels.timestep_norm.context_parallel import (
    ShardMoments,
    incoming_state,
    incoming_state_vjp,
)
from pallas_kernels.timestep_norm.row_splits.documents import (
    RowInfo,
    describe_rows,
    kernel_documents,
)
from pallas_kernels.timestep_norm.row_splits.passes import (
    TimestepNormResiduals,
    backward_inputs,
    backward_pass,
    forward_pass,
)
from pallas_kernels.timestep_norm.row_splits.state_passing import (
    add_slopes,
    final_state_slopes,
    merge_splits,
    multiply_by_count,
)
from pallas_kernels.timestep_norm.row_splits.types import (
    KernelInputs,
    TimestepNormGpuOptions,
)
from pallas_kernels.timestep_norm.types import MeanVar, TimestepNormState


class _ShardResiduals(NamedTuple):
    """Values saved by the forward pass for the backward pass.

    Attributes:
      local: residuals of the shard's rows.
      incoming: the state before the shard.
      prior: the state that every document starts from.
      shards: gathered moments of all shards.
    """

    local: TimestepNormResiduals
    incoming: TimestepNormState
    prior: TimestepNormState
    shards: ShardMoments


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalize_shard(
    options: TimestepNormGpuOptions,
    axis: str,
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    prior: MeanVar,
    prior_count: Int32[Array, ""],
    segment_ids: Int32[Array, "B L"] | None,
) -> tuple[Array, TimestepNormState]:
    """y of this device's tokens, inside `jax.shard_map`, and the state after them.

    Args:
      options: static choices.
      axis: name of the mesh axis over which the sequence is sharded.
      x: this device's tokens, whole tiles of them.
      scale: float32.
      bias: float32.
      prior: mean and variance that every document starts from.
      prior_count: tokens that they stand for.
      segment_ids: documents, numbered along whole rows; None for one document.
    """
    return _forward(
        options, axis, x, scale, bias, prior, prior_count, segment_ids, save_statistics=False
    )[0]


def _forward(options, axis, x, scale, bias, prior, prior_count, segment_ids, *, save_statistics):
    num_rows, length, _ = x.shape
    describe = partial(
        describe_rows,
        options,
        prior_count=prior_count,
        segment_ids=segment_ids,
        length=length,
    )
    documents = local_documents(segment_ids, num_rows, length)
    local_rows = describe(jnp.zeros(num_rows, jnp.int32))
    summaries = _summarize_splits(options, x, prior, local_rows)
    mean, var = _last_document_moments(summaries, local_rows)
    prior_state = TimestepNormState(prior_count, *prior)
    incoming, shards = incoming_state(documents, mean, var, prior_state, axis)
    row_info = describe(incoming.count)
    (y, mean, var), local = forward_pass(
        options,
        x,
        scale,
        bias,
        (incoming.mean, incoming.var),
        prior,
        row_info,
        save_statistics=save_statistics,
        summaries=summaries,
    )
    final_state = TimestepNormState(row_info.final_count, mean, var)
    return (y, final_state), _ShardResiduals(local, incoming, prior_state, shards)


def _backward(options, axis, residuals, cotangents):
    local, incoming, prior, shards = residuals
    dy, (_, d_mean, d_var) = cotangents
    slopes = options.kernels.slopes(options, backward_inputs(local, dy), first_split=0)
    d_incoming = _incoming_gradients(slopes, d_mean, d_var, local, incoming)
    later_d_mean, later_d_var = incoming_state_vjp(shards, prior, *d_incoming, axis)
    dx, d_scale, d_bias, d_initial, d_prior, _ = backward_pass(
        options, local, (dy, d_mean + later_d_mean, d_var + later_d_var), slopes=slopes
    )
    # A first document without tokens in earlier shards starts from the prior here.
    starts_here = (incoming.count == prior.count)[:, None]
    d_prior = tuple(
        of_later + jnp.where(starts_here, of_first, 0).sum(axis=0)
        for of_later, of_first in zip(d_prior, d_initial, strict=True)
    )
    return dx, d_scale, d_bias, d_prior, None, None


normalize_shard.defvjp(partial(_forward, save_statistics=True), _backward)


def _summarize_splits(
    options: TimestepNormGpuOptions, x: Float[Array, "B L D"], prior: MeanVar, row_info: RowInfo
) -> Float[Array, "B S G 4"]:
    """Summaries of all splits, as if every row began in this shard with a count of 0."""
    zeros = jnp.zeros((x.shape[0], options.geometry.groups), jnp.float32)
    documents = kernel_documents(row_info, (zeros, zeros), prior)
    inputs = KernelInputs(x, documents, row_info.initial_count)
    return options.kernels.moments(options, inputs, options.geometry.splits)


def _last_document_moments(summaries: Float[Array, "B S G 4"], row_info: RowInfo) -> MeanVar:
    """Mean and variance of the last document's tokens in this shard."""
    num_rows, splits, groups, _ = summaries.shape
    is_counted = jnp.ones((num_rows, splits), bool)
    if row_info.connectivity is not None:
        is_counted = row_info.connectivity.ends_in_last
    zeros = jnp.zeros((num_rows, 1, groups), jnp.float32)
    merged = merge_splits(zeros[..., :1], zeros, zeros, summaries, is_counted[:, None])
    each = 1 / jnp.maximum(merged.count, 1)
    return (merged.pivot + merged.total * each)[:, 0], (merged.squares * each)[:, 0]


def _incoming_gradients(
    slopes: Float[Array, "B S G 2"],
    d_mean: Float[Array, "B G"],
    d_var: Float[Array, "B G"],
    local: TimestepNormResiduals,
    incoming: TimestepNormState,
) -> MeanVar:
    """Gradients of the incoming mean and variance, from this shard's y and final moments."""
    row_info, pivot = local.row_info, incoming.mean[:, None]
    s, t = final_state_slopes(pivot, d_mean, d_var, local.final_mean, row_info.final_count)
    is_counted = jnp.ones(slopes.shape[:2], bool)
    if row_info.connectivity is not None:
        begins_in_first = row_info.connectivity.begins_in_first
        ends_in_first, is_counted = begins_in_first[:, None, -1:], begins_in_first[:, :-1]
        s, t = jnp.where(ends_in_first, s, 0), jnp.where(ends_in_first, t, 0)
    split_pivots = local.previous_states[..., 0]
    s, t = add_slopes((s, t), pivot, slopes, split_pivots, is_counted[:, None])
    count = incoming.count[:, None].astype(jnp.float32)
    incoming_var, incoming_mean = (multiply_by_count(count, total[:, 0]) for total in (s, t))
    if row_info.has_tokens is None:
        return incoming_mean, incoming_var
    has_tokens = row_info.has_tokens[:, None]
    return (
        jnp.where(has_tokens, incoming_mean, d_mean),
        jnp.where(has_tokens, incoming_var, d_var),
    )
