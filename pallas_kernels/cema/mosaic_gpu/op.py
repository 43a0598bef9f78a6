"""CEMA on Hopper GPUs: padding to whole tiles, and the gradient rule of whole rows."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema.final_state import last_state
from pallas_kernels.cema.mosaic_gpu.context_parallel import cema_of_own_part
from pallas_kernels.cema.mosaic_gpu.kernels import Documents, Tables
from pallas_kernels.cema.mosaic_gpu.launch import (
    Options,
    find_documents,
    make_tables,
    run_gradients,
    run_outputs,
)
from pallas_kernels.cema.mosaic_gpu.pipeline import CHANNELS, TILE
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.common.target import check_hopper, is_interpreted

# Warpgroups that the splits of all rows and channels should make: the two that an SM holds, on an
# H200's 132 SMs. More make two waves of work, and more to hand on.
WARPGROUPS = 264
# Tokens of a split at least; the kernels start and end in some microseconds.
SHORTEST_SPLIT = 128


class _Kept(NamedTuple):
    """What the backward pass needs of the forward pass; a list has an entry for every group."""

    x: Array
    params: CemaParams
    state: Array | None
    segment_ids: Array | None
    documents: Documents | None
    tables: list[Tables]
    entering: list[Array | None]


def cema_mosaic_gpu(
    x: Float[Array, "B L D"],
    params: CemaParams,
    state: Complex[Array, "B D N"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    *,
    split: int | None = None,
    sequence_axis: str | None = None,
) -> CemaOutput:
    """The kernels on arrays of any length and width; api.cema has the contract.

    Args:
      x: lengths that are not a multiple of 32 and widths not of 128 are padded in a copy.
      params: float32.
      state: the state before the row.
      segment_ids: the documents.
      split: tokens worked on by one warpgroup, a multiple of 32; a measured choice if None.
      sequence_axis: mesh axis over which the sequence is split in parts of whole tiles; there is no
        state then.

    Raises:
      ValueError: float64, a split that is no multiple of 32, or a device that is no Hopper GPU.
    """
    check_hopper("mosaic_gpu")
    if params.alpha.dtype != jnp.float32 or x.dtype == jnp.float64:
        raise ValueError(
            f"mosaic_gpu computes in float32, x is {x.dtype} and the parameters "
            f"{params.alpha.dtype}; use implementation 'xla' or 'reference'"
        )
    rows, length, width = x.shape
    missing, narrow = -length % TILE, -width % CHANNELS
    if split is None:
        split = choose_split(rows, length + missing, width + narrow)
    if split % TILE:
        raise ValueError(f"split is {split} tokens; use a multiple of {TILE}")
    if missing and segment_ids is None:
        segment_ids = jnp.ones((rows, length), jnp.int32)
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, missing)))
    x = jnp.pad(x, ((0, 0), (0, missing), (0, narrow)))
    padded = CemaParams(
        *(jnp.pad(value, ((0, narrow),) + ((0, 0),) * (value.ndim - 1)) for value in params)
    )
    if state is not None:
        state = jnp.pad(state, ((0, 0), (0, narrow), (0, 0)))
    interpret = plgpu.InterpretGPUParams() if is_interpreted() else None
    options = Options(split, interpret)
    if sequence_axis is None:
        out = _cema(options, x, padded, state, segment_ids)
    else:
        out = cema_of_own_part(options, sequence_axis, x, padded, segment_ids)
    return CemaOutput(out.y[:, :length, :width], out.final_state[:, :width])


def choose_split(rows: int, length: int, width: int) -> int:
    """Tokens of a split such that all splits fill the GPU once."""
    tiles = -(-length // TILE)
    wanted = max(1, WARPGROUPS // (rows * (width // CHANNELS)))
    shortest = SHORTEST_SPLIT // TILE
    return max(-(-tiles // min(wanted, tiles)), min(shortest, tiles)) * TILE


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cema(
    options: Options,
    x: Array,
    params: CemaParams,
    state: Array | None,
    segment_ids: Array | None,
) -> CemaOutput:
    return _forward(options, x, params, state, segment_ids, with_entering=False)[0]


def _forward(options, x, params, state, segment_ids, *, with_entering):
    documents = None if segment_ids is None else find_documents(segment_ids, options.split)
    tables = make_tables(params, options.split)
    out, entering = run_outputs(
        options, x, params, tables, documents, state, with_entering=with_entering
    )
    return out, _Kept(x, params, state, segment_ids, documents, tables, entering)


def _forward_rule(options, *primals):
    return _forward(options, *custom_vjp_primal_tree_values(primals), with_entering=True)


def _backward_rule(options, kept, cotangents):
    x, params, state, segment_ids, documents, tables, entering = kept
    dy, d_last = cotangents
    dy = jnp.zeros_like(x) if isinstance(dy, SymbolicZero) else dy
    gradients = run_gradients(options, x, dy, params, tables, documents, entering, state)
    if not isinstance(d_last, SymbolicZero):
        gradients = _add_last_state(gradients, x, params, state, segment_ids, d_last)
    return *gradients, None


_cema.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _add_last_state(gradients, x, params, state, segment_ids, d_last):
    """Adds what the gradient of the last state gives, in plain JAX."""

    def after(x, params, state):
        return last_state(x, params, state, segment_ids)

    more = jax.vjp(after, x, params, state)[1](d_last)
    return jax.tree.map(jnp.add, gradients, more)
