"""CEMA's Hopper kernels on all orders: their tables and documents, and gradients from their sums.

The kernels keep states in units of p; a list has an entry for every group of orders that one call
takes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema import coefficients
from pallas_kernels.cema.mosaic_gpu.kernels import (
    Documents,
    Geometry,
    Tables,
    run_backward,
    run_forward,
    summarize_splits,
)
from pallas_kernels.cema.mosaic_gpu.pipeline import CHANNELS, TILE
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.common.residuals import name_residuals

# Orders of one call: more do not fit in registers. Further orders are further calls, summed.
LARGEST_ORDER = 16
# The least p in units of which the state is kept; a smaller one changes h by 2^-40 of x.
_SMALLEST_WEIGHT = 2.0**-40


class Options(NamedTuple):
    """Static choices: tokens of a split, and `plgpu.InterpretGPUParams()` or None."""

    split: int
    interpret: Any


class Onward(NamedTuple):
    """What a row that goes on elsewhere knows when its gradients are made.

    Attributes:
      after: e at the token after every row.
      summaries: what `summarize` gave for dy.
    """

    after: Complex[Array, "B D N"]
    summaries: list[Array]


class Modes(NamedTuple):
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


def run_outputs(
    options: Options,
    x: Float[Array, "B L D"],
    params: CemaParams,
    tables: list[Tables],
    documents: Documents | None,
    state: Complex[Array, "B D N"] | None,
    *,
    summaries: list[Array] | None = None,
    with_entering: bool,
) -> tuple[CemaOutput, list[Array | None]]:
    """Outputs from the state before every row, and the states entering the splits.

    Args:
      options: static choices.
      x: whole tiles of tokens and channels.
      params: CEMA's parameters.
      tables: what `make_tables` made of them.
      documents: borders.
      state: before every row; None: zero.
      summaries: what `summarize` gave, if it is known.
      with_entering: whether the states entering the splits are wanted.
    """
    unit = find_unit(params)
    initial = None if state is None else to_rows(state / unit)
    outputs, lasts, enterings = [], [], []
    groups = order_groups(params.alpha.shape[1])
    for i, group in enumerate(groups):
        y, last, entering = run_forward(
            x,
            tables[i],
            None if initial is None else initial[:, :, group],
            documents,
            find_geometry(options, x, group),
            out_dtype=x.dtype if len(groups) == 1 else jnp.float32,
            with_entering=with_entering,
            interpret=options.interpret,
            summaries=None if summaries is None else summaries[i],
        )
        y, last, entering = name_residuals((y, last, entering), "cema")
        outputs.append(y)
        lasts.append(last)
        enterings.append(entering)
    last = from_rows(jnp.concatenate(lasts, axis=2)) * unit
    if documents is not None:
        # A row of padding alone keeps its state.
        before = jnp.zeros_like(last) if state is None else state
        last = jnp.where((documents.ends[:, :1] >= 0)[..., None], last, before)
    y = sum(outputs[1:], outputs[0])
    return CemaOutput(jnp.asarray(y, x.dtype), last), enterings


def run_gradients(
    options: Options,
    x: Float[Array, "B L D"],
    dy: Float[Array, "B L D"],
    params: CemaParams,
    tables: list[Tables],
    documents: Documents | None,
    entering: list[Any],
    state: Complex[Array, "B D N"] | None,
    *,
    onward: Onward | None = None,
) -> tuple[Array, CemaParams, Array | None]:
    """Gradients of Σ y dy in x, the parameters and the state.

    Args:
      options: static choices.
      x: whole tiles of tokens and channels.
      dy: like x.
      params: CEMA's parameters.
      tables: what `make_tables` made of them.
      documents: borders.
      entering: what `run_outputs` gave.
      state: before every row, if there is one that gradients are asked for.
      onward: of rows that go on elsewhere.
    """
    groups = order_groups(params.alpha.shape[1])
    after = summaries = None
    if onward is not None:
        after = to_rows(onward.after)
        passed = to_rows(_through_last_split(options, onward.after, params, documents, x.shape[1]))
        summaries = [
            rows.at[:, -1].add(passed[:, :, group])
            for rows, group in zip(onward.summaries, groups, strict=True)
        ]
    results = [
        run_backward(
            x,
            dy,
            tables[i],
            entering[i],
            documents,
            find_geometry(options, x, group),
            out_dtype=x.dtype if len(groups) == 1 else jnp.float32,
            interpret=options.interpret,
            after=None if after is None else after[:, :, group],
            summaries=None if summaries is None else summaries[i],
        )
        for i, group in enumerate(groups)
    ]
    dx = jnp.asarray(sum((result.dx for result in results[1:]), results[0].dx), x.dtype)
    modes, to_parameters = jax.vjp(find_modes, params)
    d_modes, d_state = _differentiate_modes(modes, state, documents, results)
    (d_params,) = to_parameters(d_modes)
    return dx, d_params, d_state


def summarize(
    options: Options,
    x: Float[Array, "B L D"],
    params: CemaParams,
    tables: list[Tables],
    documents: Documents | None,
    *,
    backward: bool,
) -> tuple[list[Array], Complex[Array, "B D N"]]:
    """What every split hands on, and what a row does, both from their own tokens alone.

    Forward that is the state after the row's last token; if padding follows it, the state has
    decayed. Backward x is dy, and it is e at the row's first token.
    """
    groups = order_groups(params.alpha.shape[1])
    summaries = [
        summarize_splits(
            x,
            tables[i],
            documents,
            find_geometry(options, x, group),
            backward=backward,
            interpret=options.interpret,
        )
        for i, group in enumerate(groups)
    ]
    splits, length = summaries[0].shape[1], x.shape[1]
    starts = options.split * jnp.arange(splits, dtype=jnp.int32)
    between = starts if backward else length - jnp.minimum(starts + options.split, length)
    factors = jnp.moveaxis(coefficients.powers(params, between), -1, 0)
    handed = from_rows(jnp.concatenate(summaries, axis=3))
    if documents is not None:
        # Only what no document's start lies in the way of.
        onward = documents.hands_on if backward else documents.hands_on[:, ::-1]
        open_way = jnp.cumprod(jnp.pad(onward[:, :-1], ((0, 0), (1, 0)), constant_values=1), 1)
        open_way = open_way if backward else open_way[:, ::-1]
        handed = jnp.where(open_way[..., None, None] == 1, handed, 0)
    total = (factors * handed).sum(axis=1)
    return summaries, total if backward else total * find_unit(params)


def _through_last_split(
    options: Options,
    after: Complex[Array, "B D N"],
    params: CemaParams,
    documents: Documents | None,
    length: int,
) -> Complex[Array, "B D N"]:
    """What is left of e after a row at the first token of its last split, which may be shorter."""
    tokens = (length - 1) % options.split + 1
    left = after * coefficients.powers(params, jnp.asarray([tokens], jnp.int32))[..., 0]
    if documents is None:
        return left
    return jnp.where(documents.hands_on[:, -1, None, None] == 1, left, 0)


def find_unit(params: CemaParams) -> Float[Array, "D N"]:
    """p, in units of which the kernels keep the state."""
    return jnp.maximum(coefficients.input_weight(params), _SMALLEST_WEIGHT)


def find_modes(params: CemaParams) -> Modes:
    """What gradients pass through on their way to the parameters."""
    q = coefficients.powers(params, jnp.ones(1, jnp.int32))[..., 0]
    gamma = coefficients.output_weight(params)
    p = find_unit(params)
    return Modes(q.real, q.imag, gamma.real, gamma.imag, p, params.omega)


def make_tables(params: CemaParams, split: int) -> list[Tables]:
    """What the kernels read of the parameters, for splits of so many tokens."""
    groups = order_groups(params.alpha.shape[1])
    q = coefficients.powers(params, jnp.asarray([1, split], jnp.int32))
    c = find_unit(params) * coefficients.output_weight(params)
    # Stacked before they are transposed: one small kernel instead of six.
    parts = [c for z in (q[..., 0], c, q[..., 1]) for c in (z.real, z.imag)]
    rows = jnp.swapaxes(jnp.stack(parts), 1, 2)
    damping = coefficients.damping(params).reshape(-1, CHANNELS * params.alpha.shape[1]).min(1)
    omegas = [params.omega] + [jnp.zeros_like(params.omega)] * (len(groups) - 1)
    return [
        Tables(rows[:, group], omega, damping) for group, omega in zip(groups, omegas, strict=True)
    ]


def order_groups(order: int) -> list[slice]:
    """CEMA is a sum over orders; omega goes with the first."""
    starts = range(0, order, LARGEST_ORDER)
    return [slice(start, min(start + LARGEST_ORDER, order)) for start in starts]


def find_geometry(options: Options, x: Array, group: slice) -> Geometry:
    """Sizes of the call for one group of orders."""
    return Geometry(
        rows=x.shape[0],
        tiles=x.shape[1] // TILE,
        blocks=x.shape[2] // CHANNELS,
        order=group.stop - group.start,
        tiles_per_split=options.split // TILE,
    )


def find_documents(segment_ids: Int32[Array, "B L"], split: int) -> Documents:
    """Borders of packed rows, for splits of so many tokens."""
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


def to_rows(z: Complex[Array, "*S D N"]) -> Float[Array, "*S 2 N D"]:
    """Complex states as the kernels lay them out."""
    return jnp.swapaxes(jnp.stack([z.real, z.imag], axis=-3), -1, -2)


def from_rows(a: Float[Array, "*S 2 N D"]) -> Complex[Array, "*S D N"]:
    """The inverse of `to_rows`."""
    a = jnp.swapaxes(a, -1, -2)
    return jax.lax.complex(a[..., 0, :, :], a[..., 1, :, :])


def _differentiate_modes(modes, state, documents, results):
    """From the kernels' sums to gradients of q, gamma, p, omega and the state.

    L = Re f for f that is analytic in q and gamma, so dL/dRe q = Re f', dL/dIm q = -Im f'.
    """
    q, gamma = modes.q, modes.gamma

    def join(name, axes=()):
        parts = [getattr(result, name).sum(axis=axes) for result in results]
        return from_rows(jnp.concatenate(parts, axis=-2))

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
    d_modes = Modes(
        q_real=d_q.real,
        q_imag=-d_q.imag,
        gamma_real=d_gamma.real,
        gamma_imag=-d_gamma.imag,
        p=(gamma * x_e).real,
        omega=results[0].x_dy.sum(axis=(0, 1)),
    )
    return d_modes, d_state
