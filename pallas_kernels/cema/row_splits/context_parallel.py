"""CEMA's GPU kernels under context parallelism.

A sequence shard is to the row what a split is to the shard: the kernels' summaries of the splits
give the shard's summary without a second pass over x. Forward: summarize the own shard, all-gather
and fold the summaries (`incoming_state`), run the outputs. Backward: summarize dy, the transpose
(`incoming_state_vjp`), run the gradients. No device waits for the outputs of another one.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Float, Int32

from pallas_kernels.cema.context_parallel import ShardDecays, incoming_state, incoming_state_vjp
from pallas_kernels.cema.final_state import final_state
from pallas_kernels.cema.row_splits.passes import (
    CemaInputs,
    CemaOptions,
    IncomingGradient,
    prepare,
    run_gradients,
    run_outputs,
    summarize,
)
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.common.context_parallel import local_documents


class CemaShardResiduals(NamedTuple):
    """Values saved by the forward pass for the backward pass.

    Attributes:
      inputs: of this shard.
      previous_states: the states before its splits, for every group of orders.
      shards: the decays of all shards.
    """

    inputs: CemaInputs
    previous_states: list[Array | None]
    shards: ShardDecays


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cema_of_shard(
    options: CemaOptions,
    axis: str,
    x: Float[Array, "B L D"],
    params: CemaParams,
    segment_ids: Int32[Array, "B L"] | None,
) -> CemaOutput:
    """CEMA of this device's sequence shard, inside `jax.shard_map`; contract as in `api.cema`.

    Args:
      options: static choices.
      axis: mesh axis of the sequence shards.
      x: this device's shard, whole tiles of tokens and of channels.
      params: CEMA's parameters.
      segment_ids: documents, numbered along whole rows.
    """
    return _forward(options, axis, x, params, segment_ids, save_split_states=False)[0]


def _forward(options, axis, x, params, segment_ids, *, save_split_states):
    inputs = prepare(options, x, params, segment_ids)
    # If padding follows the last document, its summary has decayed, but then no shard continues it.
    summaries, summary = summarize(options, x, inputs, backward=False)
    documents = local_documents(segment_ids, *x.shape[:2])
    before, shards = incoming_state(summary, documents, params, axis)
    out, previous_states = run_outputs(
        options, inputs, before, summaries=summaries, save_split_states=save_split_states
    )
    return out, CemaShardResiduals(inputs, previous_states, shards)


def _forward_rule(options, axis, *primals):
    primals = custom_vjp_primal_tree_values(primals)
    return _forward(options, axis, *primals, save_split_states=True)


def _backward_rule(options, axis, residuals, cotangents):
    inputs, previous_states, shards = residuals
    dy, d_final_state = cotangents
    dy = jnp.zeros_like(inputs.x) if isinstance(dy, SymbolicZero) else dy
    summaries, summary = summarize(options, dy, inputs, backward=True)
    incoming = IncomingGradient(incoming_state_vjp(summary, shards, axis), summaries)
    dx, d_params, _ = run_gradients(options, inputs, dy, None, previous_states, incoming=incoming)
    gradients = dx, d_params
    if not isinstance(d_final_state, SymbolicZero):
        more = _final_state_gradients(axis, inputs, d_final_state)
        gradients = jax.tree.map(jnp.add, gradients, more)
    return *gradients, None


cema_of_shard.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _final_state_gradients(axis, inputs, d_final_state):
    """Gradients of x and the parameters from the state after this shard, in plain JAX."""
    segment_ids = inputs.segment_ids
    documents = local_documents(segment_ids, *inputs.x.shape[:2])

    def state_after(x, params):
        summary = final_state(x, params, None, segment_ids)
        before, _ = incoming_state(summary, documents, params, axis)
        return final_state(x, params, before, segment_ids)

    return jax.vjp(state_after, inputs.x, inputs.params)[1](d_final_state)
