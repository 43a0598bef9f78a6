"""CEMA on Hopper GPUs over a sequence that is split over devices.

A device's part is to the row what a split is to a part. The kernels sum up what every split hands
on; the part's own sum goes to the other devices once, and the outputs start from what comes in.
Backward the same happens with e, which dy drives. Nothing is computed twice, and no device waits
for another's outputs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Float, Int32

from pallas_kernels.cema.context_parallel import Links, enter, enter_backward
from pallas_kernels.cema.final_state import last_state
from pallas_kernels.cema.mosaic_gpu.kernels import Documents, Tables
from pallas_kernels.cema.mosaic_gpu.launch import (
    Onward,
    Options,
    find_documents,
    make_tables,
    run_gradients,
    run_outputs,
    summarize,
)
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.common import context_parallel


class _Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    x: Array
    params: CemaParams
    segment_ids: Array | None
    documents: Documents | None
    tables: list[Tables]
    entering: list[Array | None]
    links: Links


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cema_of_own_part(
    options: Options,
    axis: str,
    x: Float[Array, "B L D"],
    params: CemaParams,
    segment_ids: Int32[Array, "B L"] | None,
) -> CemaOutput:
    """Outputs of this device's tokens, inside `jax.shard_map`; `api.cema` has the contract.

    Args:
      options: static choices.
      axis: mesh axis over which the sequence is split.
      x: this device's tokens, whole tiles of them and of channels.
      params: CEMA's parameters.
      segment_ids: documents, numbered along whole rows.
    """
    return _forward(options, axis, x, params, segment_ids, with_entering=False)[0]


def _forward(options, axis, x, params, segment_ids, *, with_entering):
    documents = None if segment_ids is None else find_documents(segment_ids, options.split)
    tables = make_tables(params, options.split)
    # Where padding follows a part's last document, no other part goes on with it.
    summaries, own = summarize(options, x, params, tables, documents, backward=False)
    part = context_parallel.local_documents(segment_ids, *x.shape[:2])
    before, links = enter(own, part, params, axis)
    out, entering = run_outputs(
        options,
        x,
        params,
        tables,
        documents,
        before,
        summaries=summaries,
        with_entering=with_entering,
    )
    return out, _Kept(x, params, segment_ids, documents, tables, entering, links)


def _forward_rule(options, axis, *primals):
    return _forward(options, axis, *custom_vjp_primal_tree_values(primals), with_entering=True)


def _backward_rule(options, axis, kept, cotangents):
    x, params, segment_ids, documents, tables, entering, links = kept
    dy, d_last = cotangents
    dy = jnp.zeros_like(x) if isinstance(dy, SymbolicZero) else dy
    summaries, first = summarize(options, dy, params, tables, documents, backward=True)
    onward = Onward(enter_backward(first, links, axis), summaries)
    *gradients, _ = run_gradients(
        options, x, dy, params, tables, documents, entering, None, onward=onward
    )
    if not isinstance(d_last, SymbolicZero):
        gradients = _add_last_state(tuple(gradients), axis, x, params, segment_ids, d_last)
    return *gradients, None


cema_of_own_part.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _add_last_state(gradients, axis, x, params, segment_ids, d_last):
    """Adds what the gradient of the state after this part gives, in plain JAX."""
    part = context_parallel.local_documents(segment_ids, *x.shape[:2])

    def after(x, params):
        before, _ = enter(last_state(x, params, None, segment_ids), part, params, axis)
        return last_state(x, params, before, segment_ids)

    more = jax.vjp(after, x, params)[1](d_last)
    return jax.tree.map(jnp.add, gradients, more)
