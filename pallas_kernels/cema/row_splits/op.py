"""CEMA by a backend's kernels: padding to whole tiles, and the gradient rule of whole rows."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema.context_parallel import with_context_parallelism
from pallas_kernels.cema.final_state import final_state
from pallas_kernels.cema.row_splits.context_parallel import cema_of_shard
from pallas_kernels.cema.row_splits.passes import (
    CemaInputs,
    CemaOptions,
    prepare,
    run_gradients,
    run_outputs,
)
from pallas_kernels.cema.row_splits.types import CHANNELS, TILE, CemaKernels
from pallas_kernels.cema.types import CemaOutput, CemaParams


class CemaBackend(NamedTuple):
    """A backend as `cema_by_splits` takes it.

    Attributes:
      name: of the implementation, for errors.
      kernels: its launches.
      choose_split_size: (rows, length, width) to the tokens of a split.
      interpret: as in `CemaOptions`.
    """

    name: str
    kernels: CemaKernels
    choose_split_size: Callable[[int, int, int], int]
    interpret: Any


class CemaResiduals(NamedTuple):
    """Values saved by the forward pass for the backward pass.

    Attributes:
      inputs: of the call.
      initial_state: before every row, or None.
      previous_states: the states before the splits, for every group of orders.
    """

    inputs: CemaInputs
    initial_state: Array | None
    previous_states: list[Array | None]


def cema_by_splits(
    x: Float[Array, "B L D"],
    params: CemaParams,
    initial_state: Complex[Array, "B D N"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    *,
    backend: CemaBackend,
    block_size: int | None = None,
    sequence_axis: str | None = None,
) -> CemaOutput:
    """CEMA by the kernels of a backend; contract as in `api.cema`.

    Args:
      x: lengths that are no multiple of 32 and widths that are none of 128 are padded in a copy.
      params: float32.
      initial_state: the state before the row.
      segment_ids: the documents.
      backend: the kernels.
      block_size: tokens of a split of the row, a multiple of 32; the backend's choice if None.
      sequence_axis: mesh axis of the sequence shards; None: whole rows.

    Raises:
      ValueError: float64, or a split that is no multiple of 32.
    """
    run = partial(_pad_and_run, backend=backend)
    if sequence_axis is not None and x.shape[1] % TILE:
        # The kernels' summaries are those of whole tiles only.
        return with_context_parallelism(run)(
            x,
            params,
            initial_state,
            segment_ids,
            block_size=block_size,
            sequence_axis=sequence_axis,
        )
    return run(
        x, params, initial_state, segment_ids, block_size=block_size, sequence_axis=sequence_axis
    )


def _pad_and_run(
    x, params, initial_state, segment_ids, *, backend, block_size, sequence_axis=None
) -> CemaOutput:
    if params.alpha.dtype != jnp.float32 or x.dtype == jnp.float64:
        raise ValueError(
            f"{backend.name} computes in float32, x is {x.dtype} and the parameters "
            f"{params.alpha.dtype}; use implementation 'xla' or 'reference'"
        )
    rows, length, width = x.shape
    pad_length, pad_width = -length % TILE, -width % CHANNELS
    if block_size is None:
        block_size = backend.choose_split_size(rows, length + pad_length, width + pad_width)
    if block_size % TILE:
        raise ValueError(f"block_size is {block_size} tokens; use a multiple of {TILE}")
    if pad_length and segment_ids is None:
        segment_ids = jnp.ones((rows, length), jnp.int32)
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad_length)))
    x = jnp.pad(x, ((0, 0), (0, pad_length), (0, pad_width)))
    params = CemaParams(
        *(jnp.pad(value, ((0, pad_width),) + ((0, 0),) * (value.ndim - 1)) for value in params)
    )
    if initial_state is not None:
        initial_state = jnp.pad(initial_state, ((0, 0), (0, pad_width), (0, 0)))
    options = CemaOptions(backend.kernels, block_size, backend.interpret)
    if sequence_axis is None:
        out = _cema(options, x, params, initial_state, segment_ids)
    else:
        out = cema_of_shard(options, sequence_axis, x, params, segment_ids)
    return CemaOutput(out.y[:, :length, :width], out.final_state[:, :width])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cema(
    options: CemaOptions,
    x: Array,
    params: CemaParams,
    initial_state: Array | None,
    segment_ids: Array | None,
) -> CemaOutput:
    return _forward(options, x, params, initial_state, segment_ids, save_split_states=False)[0]


def _forward(options, x, params, initial_state, segment_ids, *, save_split_states):
    inputs = prepare(options, x, params, segment_ids)
    out, previous_states = run_outputs(
        options, inputs, initial_state, save_split_states=save_split_states
    )
    return out, CemaResiduals(inputs, initial_state, previous_states)


def _forward_rule(options, *primals):
    primals = custom_vjp_primal_tree_values(primals)
    return _forward(options, *primals, save_split_states=True)


def _backward_rule(options, residuals, cotangents):
    inputs, initial_state, previous_states = residuals
    dy, d_final_state = cotangents
    dy = jnp.zeros_like(inputs.x) if isinstance(dy, SymbolicZero) else dy
    gradients = run_gradients(options, inputs, dy, initial_state, previous_states)
    if not isinstance(d_final_state, SymbolicZero):
        more = _final_state_gradients(inputs, initial_state, d_final_state)
        gradients = jax.tree.map(jnp.add, gradients, more)
    return *gradients, None


_cema.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _final_state_gradients(inputs, initial_state, d_final_state):
    """Gradients of x, the parameters and the initial state from the final state, in plain JAX."""

    def state_after(x, params, initial_state):
        return final_state(x, params, initial_state, inputs.segment_ids)

    primals = inputs.x, inputs.params, initial_state
    return jax.vjp(state_after, *primals)[1](d_final_state)
