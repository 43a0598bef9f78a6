"""CEMA on Hopper GPUs: what surrounds the kernels of `mosaic_gpu_kernels`.

Padding to whole tiles, tables, documents, the gradient rule, and from the kernels' sums to the
gradients of the parameters.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema import coefficients
from pallas_kernels.cema.last_state import last_state
from pallas_kernels.cema.mosaic_gpu_kernels import (
    Documents,
    Geometry,
    Tables,
    run_backward,
    run_forward,
)
from pallas_kernels.cema.mosaic_gpu_stream import CHANNELS, TILE
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.residuals import keep
from pallas_kernels.target import check_hopper, is_interpreted

# Orders of one call: more do not fit in registers. Further orders are further calls, summed.
LARGEST_ORDER = 16
# Warpgroups that the splits of all rows and channels should make: the two that an SM holds, on an
# H200's 132 SMs. More make two waves of work, and more to hand on.
WARPGROUPS = 264
# Tokens of a split at least; the kernels start and end in some microseconds.
SHORTEST_SPLIT = 128
# The least p in units of which the state is kept; a smaller one changes h by 2^-40 of x.
_SMALLEST_WEIGHT = 2.0**-40


class _Options(NamedTuple):
    split: int
    interpret: Any


class _Modes(NamedTuple):
    """q and gamma / √N by their parts, p and omega."""

    q_real: Float[Array, "D N"]
    q_imag: Float[Array, "D N"]
    gamma_real: Float[Array, "D N"]
    gamma_imag: Float[Array, "D N"]
    p: Float[Array, "D N"]
    omega: Float[Array, " D"]

    @property
    def q(self) -> Complex[Array, "D N"]:
        return jax.lax.complex(self.q_real, self.q_imag)

    @property
    def gamma(self) -> Complex[Array, "D N"]:
        return jax.lax.complex(self.gamma_real, self.gamma_imag)


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
) -> CemaOutput:
    """The kernels on arrays of any length and width; api.cema has the contract.

    Args:
      x: lengths that are not a multiple of 32 and widths not of 128 are padded in a copy.
      params: float32.
      state: the state before the row.
      segment_ids: the documents.
      split: tokens worked on by one warpgroup, a multiple of 32; a measured choice if None.

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
    out = _cema(_Options(split, interpret), x, padded, state, segment_ids)
    return CemaOutput(out.y[:, :length, :width], out.state[:, :width])


def choose_split(rows: int, length: int, width: int) -> int:
    """Tokens of a split such that all splits fill the GPU once."""
    tiles = -(-length // TILE)
    wanted = max(1, WARPGROUPS // (rows * (width // CHANNELS)))
    shortest = SHORTEST_SPLIT // TILE
    return max(-(-tiles // min(wanted, tiles)), min(shortest, tiles)) * TILE


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cema(
    options: _Options,
    x: Array,
    params: CemaParams,
    state: Array | None,
    segment_ids: Array | None,
) -> CemaOutput:
    return _forward(options, x, params, state, segment_ids, with_entering=False)[0]


def _forward(options, x, params, state, segment_ids, *, with_entering):
    documents = None if segment_ids is None else _find_documents(segment_ids, options.split)
    unit = _find_unit(params)
    groups = _order_groups(params.alpha.shape[1])
    initial = None if state is None else _to_rows(state / unit)
    outputs, lasts = [], []
    kept = _Kept(x, params, state, segment_ids, documents, [], [])
    for group, tables in zip(groups, _make_tables(params, groups, options.split), strict=True):
        y, last, entering = run_forward(
            x,
            tables,
            None if initial is None else initial[:, :, group],
            documents,
            _geometry(options, x, group),
            out_dtype=x.dtype if len(groups) == 1 else jnp.float32,
            with_entering=with_entering,
            interpret=options.interpret,
        )
        y, last, entering = keep((y, last, entering), "cema")
        outputs.append(y)
        lasts.append(last)
        kept.tables.append(tables)
        kept.entering.append(entering)
    last = _from_rows(jnp.concatenate(lasts, axis=2)) * unit
    if documents is not None:
        # A row of padding alone keeps its state.
        before = jnp.zeros_like(last) if state is None else state
        last = jnp.where((documents.ends[:, :1] >= 0)[..., None], last, before)
    y = sum(outputs[1:], outputs[0])
    return CemaOutput(jnp.asarray(y, x.dtype), last), kept


def _forward_rule(options, *primals):
    return _forward(options, *custom_vjp_primal_tree_values(primals), with_entering=True)


def _backward_rule(options, kept, cotangents):
    x, params, state, segment_ids, documents = kept[:5]
    dy, d_last = cotangents
    dy = jnp.zeros_like(x) if isinstance(dy, SymbolicZero) else dy
    groups = _order_groups(params.alpha.shape[1])
    results = [
        run_backward(
            x,
            dy,
            tables,
            entering,
            documents,
            _geometry(options, x, group),
            out_dtype=x.dtype if len(groups) == 1 else jnp.float32,
            interpret=options.interpret,
        )
        for group, tables, entering in zip(groups, kept.tables, kept.entering, strict=True)
    ]
    dx = jnp.asarray(sum((result.dx for result in results[1:]), results[0].dx), x.dtype)
    modes, to_parameters = jax.vjp(_find_modes, params)
    d_modes, d_state = _differentiate_modes(modes, state, documents, results)
    gradients = dx, *to_parameters(d_modes), d_state
    if not isinstance(d_last, SymbolicZero):
        gradients = _add_last_state(gradients, x, params, state, segment_ids, d_last)
    return *gradients, None


_cema.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _differentiate_modes(modes, state, documents, results):
    """From the kernels' sums to gradients of q, gamma, p, omega and the state.

    L = Re f for f that is analytic in q and gamma, so dL/dRe q = Re f', dL/dIm q = -Im f'.
    """
    q, gamma = modes.q, modes.gamma

    def join(name, axes=()):
        parts = [getattr(result, name).sum(axis=axes) for result in results]
        return _from_rows(jnp.concatenate(parts, axis=-2))

    x_e, x_k = join("x_e", (0, 1)), join("x_k", (0, 1))
    d_gamma, d_q = modes.p * x_e, modes.p * gamma * x_k
    d_state = None
    if state is not None:
        first_e, first_k = join("first_e"), join("first_k")
        if documents is None:
            late_k = jnp.zeros_like(first_k)
        else:
            # After padding the kernel has forgotten k before the split's first token.
            has_tokens, starts_late = documents.ends[:, :1] >= 0, documents.ends[:, :1] > 0
            first_e = jnp.where(has_tokens[..., None], first_e, 0)
            late_k = jnp.where(starts_late[..., None], first_k, 0)
        d_gamma += (q * state * first_e).sum(axis=0)
        d_q += (gamma * state * (first_e + q * late_k)).sum(axis=0)
        d_state = gamma * q * first_e
    d_modes = _Modes(
        q_real=d_q.real,
        q_imag=-d_q.imag,
        gamma_real=d_gamma.real,
        gamma_imag=-d_gamma.imag,
        p=(gamma * x_e).real,
        omega=results[0].x_dy.sum(axis=(0, 1)),
    )
    return d_modes, d_state


def _add_last_state(gradients, x, params, state, segment_ids, d_last):
    """Adds what the gradient of the last state gives, in plain JAX."""

    def after(x, params, state):
        return last_state(x, params, state, segment_ids)

    more = jax.vjp(after, x, params, state)[1](d_last)
    return jax.tree.map(jnp.add, gradients, more)


def _find_unit(params: CemaParams) -> Float[Array, "D N"]:
    """p, in units of which the kernels keep the state."""
    return jnp.maximum(coefficients.input_weight(params), _SMALLEST_WEIGHT)


def _find_modes(params: CemaParams) -> _Modes:
    q = coefficients.powers(params, jnp.ones(1, jnp.int32))[..., 0]
    gamma = coefficients.output_weight(params)
    p = _find_unit(params)
    return _Modes(q.real, q.imag, gamma.real, gamma.imag, p, params.omega)


def _make_tables(params: CemaParams, groups: list[slice], split: int) -> list[Tables]:
    q = coefficients.powers(params, jnp.asarray([1, split], jnp.int32))
    c = _find_unit(params) * coefficients.output_weight(params)
    # Stacked before they are transposed: one small kernel instead of six.
    parts = [c for z in (q[..., 0], c, q[..., 1]) for c in (z.real, z.imag)]
    rows = jnp.swapaxes(jnp.stack(parts), 1, 2)
    damping = coefficients.damping(params).reshape(-1, CHANNELS * params.alpha.shape[1]).min(1)
    omegas = [params.omega] + [jnp.zeros_like(params.omega)] * (len(groups) - 1)
    return [
        Tables(rows[:, group], omega, damping) for group, omega in zip(groups, omegas, strict=True)
    ]


def _order_groups(order: int) -> list[slice]:
    """CEMA is a sum over orders; omega goes with the first."""
    starts = range(0, order, LARGEST_ORDER)
    return [slice(start, min(start + LARGEST_ORDER, order)) for start in starts]


def _geometry(options: _Options, x: Array, group: slice) -> Geometry:
    return Geometry(
        rows=x.shape[0],
        tiles=x.shape[1] // TILE,
        blocks=x.shape[2] // CHANNELS,
        order=group.stop - group.start,
        tiles_per_split=options.split // TILE,
    )


def _find_documents(segment_ids: Int32[Array, "B L"], split: int) -> Documents:
    rows, length = segment_ids.shape
    position = jnp.arange(length, dtype=jnp.int32)
    live = segment_ids != 0
    first = jnp.where(live, position, length).min(axis=1)
    last = jnp.where(live, position, -1).max(axis=1)
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    is_row_start = position == 0
    starts = live & (segment_ids != before) & ~is_row_start
    weights = jnp.left_shift(jnp.int32(1), jnp.arange(TILE, dtype=jnp.int32))

    def words(flags: Array) -> Array:
        return (flags.reshape(rows, -1, TILE) * weights).sum(-1, dtype=jnp.int32)

    padded = jnp.pad(starts, ((0, 0), (0, -length % split)))
    return Documents(
        bits=jnp.stack([words(starts), words(~live)], axis=-1),
        ends=jnp.stack([jnp.where(last < 0, -1, first), last], axis=-1),
        hands_on=(~padded.reshape(rows, -1, split).any(-1)).astype(jnp.int32),
    )


def _to_rows(z: Complex[Array, "*S D N"]) -> Float[Array, "*S 2 N D"]:
    return jnp.swapaxes(jnp.stack([z.real, z.imag], axis=-3), -1, -2)


def _from_rows(a: Float[Array, "*S 2 N D"]) -> Complex[Array, "*S D N"]:
    a = jnp.swapaxes(a, -1, -2)
    return jax.lax.complex(a[..., 0, :, :], a[..., 1, :, :])
