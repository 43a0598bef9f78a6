"""Forward and backward pass of CEMA over all orders, around the kernel launches.

Lists have one entry per group of orders (`tables.order_groups`); the kernels' states are divided
by p.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema import coefficients
from pallas_kernels.cema.row_splits.tables import (
    CemaCoefficients,
    CemaDocuments,
    CemaOperands,
    CemaTables,
    find_coefficients,
    find_documents,
    make_tables,
    order_groups,
    state_scale,
)
from pallas_kernels.cema.row_splits.types import (
    CHANNELS,
    TILE,
    CemaForwardResults,
    CemaGeometry,
    CemaGradientSums,
    CemaKernels,
    from_rows,
    to_rows,
)
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.common.residuals import name_residuals


class CemaOptions(NamedTuple):
    """Static choices of a call.

    Attributes:
      kernels: of the backend.
      split_size: tokens of a split.
      interpret: runs the kernels without their device, as the backend's launcher takes it.
    """

    kernels: CemaKernels
    split_size: int
    interpret: Any


class CemaInputs(NamedTuple):
    """The inputs of a call, with boundaries and coefficients for the kernels.

    Attributes:
      x: whole tiles of tokens and channels.
      params: CEMA's parameters.
      segment_ids: documents, or None.
      documents: their boundaries, or None.
      tables: coefficients for every group of orders.
    """

    x: Float[Array, "B L D"]
    params: CemaParams
    segment_ids: Int32[Array, "B L"] | None
    documents: CemaDocuments | None
    tables: list[CemaTables]


class IncomingGradient(NamedTuple):
    """The gradient that later sequence shards send to this one.

    Attributes:
      adjoint: the adjoint state e at the token after every row of this shard.
      summaries: from `summarize` of dy.
    """

    adjoint: Complex[Array, "B D N"]
    summaries: list[Array]


def prepare(
    options: CemaOptions,
    x: Float[Array, "B L D"],
    params: CemaParams,
    segment_ids: Int32[Array, "B L"] | None,
) -> CemaInputs:
    """Finds document boundaries and coefficients."""
    documents = None if segment_ids is None else find_documents(segment_ids, options.split_size)
    return CemaInputs(x, params, segment_ids, documents, make_tables(params, options.split_size))


def summarize(
    options: CemaOptions, x: Float[Array, "B L D"], inputs: CemaInputs, *, backward: bool
) -> tuple[list[Array], Complex[Array, "B D N"]]:
    """Summaries of the splits and of the rows, both from their own tokens alone.

    Args:
      options: static choices.
      x: the inputs' x; their dy if `backward`.
      inputs: from `prepare`.
      backward: backward in time.

    Returns:
      The summaries of all splits. The final state of every row, decayed further if padding follows
      its last token; if `backward`, e at the row's first token.
    """
    params, documents = inputs.params, inputs.documents
    summaries = [
        _launch_summaries(
            options,
            x,
            CemaOperands(tables, documents),
            _find_geometry(options, x, group),
            backward=backward,
        )
        for tables, group in zip(inputs.tables, order_groups(params.alpha.shape[1]), strict=True)
    ]
    # Tokens between a split and the end of the row, or its start if backward.
    splits, length = summaries[0].shape[1], x.shape[1]
    starts = options.split_size * jnp.arange(splits, dtype=jnp.int32)
    between = starts if backward else length - jnp.minimum(starts + options.split_size, length)
    decays = jnp.moveaxis(coefficients.powers(params, between), -1, 0)
    states = from_rows(jnp.concatenate(summaries, axis=3))
    if documents is not None:
        # A document that starts in between stops the state.
        passes = documents.passes_state_through
        passes = passes if backward else passes[:, ::-1]
        reaches = jnp.cumprod(jnp.pad(passes[:, :-1], ((0, 0), (1, 0)), constant_values=1), 1)
        reaches = reaches if backward else reaches[:, ::-1]
        states = jnp.where(reaches[..., None, None] == 1, states, 0)
    total = (decays * states).sum(axis=1)
    return summaries, total if backward else total * state_scale(params)


def run_outputs(
    options: CemaOptions,
    inputs: CemaInputs,
    initial_state: Complex[Array, "B D N"] | None,
    *,
    summaries: list[Array] | None = None,
    save_split_states: bool,
) -> tuple[CemaOutput, list[Array | None]]:
    """Outputs, final states, and the states before the splits if they are to be saved.

    Args:
      options: static choices.
      inputs: from `prepare`.
      initial_state: before every row; None: zero.
      summaries: from `summarize`, if they are known.
      save_split_states: whether the backward pass follows.
    """
    x, params, _, documents, tables = inputs
    scale = state_scale(params)
    initial = None if initial_state is None else to_rows(initial_state / scale)
    outputs, final_states, previous_states = [], [], []
    groups = order_groups(params.alpha.shape[1])
    for i, group in enumerate(groups):
        operands = CemaOperands(
            tables[i],
            documents,
            initial=None if initial is None else initial[:, :, group],
            summaries=None if summaries is None else summaries[i],
        )
        results = _launch_outputs(
            options,
            x,
            operands,
            _find_geometry(options, x, group),
            out_dtype=x.dtype if len(groups) == 1 else jnp.float32,
            save_split_states=save_split_states,
        )
        results = name_residuals(results, "cema")
        outputs.append(results.y)
        final_states.append(results.final_state)
        previous_states.append(results.previous_states)
    final_state = from_rows(jnp.concatenate(final_states, axis=2)) * scale
    if documents is not None:
        # A row of padding keeps its state.
        unchanged = jnp.zeros_like(final_state) if initial_state is None else initial_state
        has_tokens = (documents.row_ends[:, :1] >= 0)[..., None]
        final_state = jnp.where(has_tokens, final_state, unchanged)
    y = sum(outputs[1:], outputs[0])
    return CemaOutput(jnp.asarray(y, x.dtype), final_state), previous_states


def run_gradients(
    options: CemaOptions,
    inputs: CemaInputs,
    dy: Float[Array, "B L D"],
    initial_state: Complex[Array, "B D N"] | None,
    previous_states: list[Any],
    *,
    incoming: IncomingGradient | None = None,
) -> tuple[Array, CemaParams, Array | None]:
    """Gradients of Σ y dy in x, the parameters and the initial state.

    Args:
      options: static choices.
      inputs: from `prepare`.
      dy: like x.
      initial_state: before every row, if there is one whose gradient is needed.
      previous_states: from `run_outputs`.
      incoming: from later sequence shards, if there are any.
    """
    x, params, _, documents, tables = inputs
    groups = order_groups(params.alpha.shape[1])
    adjoint = summaries = None
    if incoming is not None:
        adjoint = to_rows(incoming.adjoint)
        decayed = to_rows(_decay_through_last_split(options, incoming.adjoint, inputs))
        summaries = [
            rows.at[:, -1].add(decayed[:, :, group])
            for rows, group in zip(incoming.summaries, groups, strict=True)
        ]
    results = [
        _launch_gradients(
            options,
            x,
            dy,
            CemaOperands(
                tables[i],
                documents,
                initial=None if adjoint is None else adjoint[:, :, group],
                summaries=None if summaries is None else summaries[i],
                previous_states=previous_states[i],
            ),
            _find_geometry(options, x, group),
            out_dtype=x.dtype if len(groups) == 1 else jnp.float32,
        )
        for i, group in enumerate(groups)
    ]
    dx = jnp.asarray(sum((result.dx for result in results[1:]), results[0].dx), x.dtype)
    values, to_parameters = jax.vjp(find_coefficients, params)
    d_coefficients, d_initial_state = _coefficient_gradients(
        values, initial_state, documents, results
    )
    (d_params,) = to_parameters(d_coefficients)
    return dx, d_params, d_initial_state


def _launch_summaries(
    options: CemaOptions,
    x: Array,
    operands: CemaOperands,
    geometry: CemaGeometry,
    *,
    splits: range | None = None,
    backward: bool,
) -> Float[Array, "B S 2 N D"]:
    """Summaries of `splits`; None: of all splits."""
    splits = range(geometry.splits) if splits is None else splits
    return options.kernels.summaries(
        x, operands, geometry, splits=splits, backward=backward, interpret=options.interpret
    )


def _launch_outputs(
    options: CemaOptions,
    x: Array,
    operands: CemaOperands,
    geometry: CemaGeometry,
    *,
    out_dtype: Any,
    save_split_states: bool,
) -> CemaForwardResults:
    """Summaries of the splits if operands lack them, then the outputs."""
    if operands.summaries is None and geometry.splits > 1:
        # No split follows the last one.
        all_but_last = range(geometry.splits - 1)
        summaries = _launch_summaries(
            options, x, operands, geometry, splits=all_but_last, backward=False
        )
        operands = operands._replace(summaries=summaries)
    return options.kernels.outputs(
        x,
        operands,
        geometry,
        out_dtype=out_dtype,
        save_split_states=save_split_states,
        interpret=options.interpret,
    )


def _launch_gradients(
    options: CemaOptions,
    x: Array,
    dy: Array,
    operands: CemaOperands,
    geometry: CemaGeometry,
    *,
    out_dtype: Any,
) -> CemaGradientSums:
    """Summaries of dy if operands lack them, then the gradients."""
    summaries = None
    if geometry.splits > 1 and operands.summaries is not None:
        summaries = operands.summaries[:, 1:]
    elif geometry.splits > 1:
        # No split precedes the first one.
        inputs = CemaOperands(operands.tables, operands.documents)
        all_but_first = range(1, geometry.splits)
        summaries = _launch_summaries(
            options, dy, inputs, geometry, splits=all_but_first, backward=True
        )
    return options.kernels.gradients(
        x,
        dy,
        operands._replace(summaries=summaries),
        geometry,
        out_dtype=out_dtype,
        interpret=options.interpret,
    )


def _decay_through_last_split(
    options: CemaOptions, adjoint: Complex[Array, "B D N"], inputs: CemaInputs
) -> Complex[Array, "B D N"]:
    """e after a row, decayed to the first token of its last split, which may be shorter."""
    tokens = (inputs.x.shape[1] - 1) % options.split_size + 1
    decay = coefficients.powers(inputs.params, jnp.asarray([tokens], jnp.int32))[..., 0]
    decayed = adjoint * decay
    if inputs.documents is None:
        return decayed
    passes = inputs.documents.passes_state_through[:, -1, None, None] == 1
    return jnp.where(passes, decayed, 0)


def _find_geometry(options: CemaOptions, x: Array, group: slice) -> CemaGeometry:
    return CemaGeometry(
        rows=x.shape[0],
        tiles=x.shape[1] // TILE,
        channel_blocks=x.shape[2] // CHANNELS,
        order=group.stop - group.start,
        tiles_per_split=options.split_size // TILE,
    )


def _coefficient_gradients(
    values: CemaCoefficients,
    initial_state: Complex[Array, "B D N"] | None,
    documents: CemaDocuments | None,
    results: list[CemaGradientSums],
) -> tuple[CemaCoefficients, Complex[Array, "B D N"] | None]:
    """From the kernels' sums to gradients of q, gamma, p, omega and the initial state.

    L = Re f for an f that is analytic in q and gamma, so dL/dRe q = Re f', dL/dIm q = -Im f'.
    """
    q, gamma = values.q, values.gamma

    def join_orders(name: str, axes: tuple[int, ...] = ()) -> Array:
        groups = [getattr(result, name).sum(axis=axes) for result in results]
        return from_rows(jnp.concatenate(groups, axis=-2))

    x_e, x_k = join_orders("x_e", (0, 1)), join_orders("x_k", (0, 1))
    d_gamma, d_q = values.p * x_e, values.p * gamma * x_k
    d_initial_state = None
    if initial_state is not None:
        first_e, first_k = join_orders("first_e"), join_orders("first_k")
        if documents is None:
            late_k = jnp.zeros_like(first_k)
        else:
            # After left padding the kernel has lost k at the split's first token.
            row_ends = documents.row_ends
            has_tokens, starts_late = row_ends[:, :1] >= 0, row_ends[:, :1] > 0
            first_e = jnp.where(has_tokens[..., None], first_e, 0)
            late_k = jnp.where(starts_late[..., None], first_k, 0)
        d_gamma += (q * initial_state * first_e).sum(axis=0)
        d_q += (gamma * initial_state * (first_e + q * late_k)).sum(axis=0)
        d_initial_state = gamma * q * first_e
    d_values = CemaCoefficients(
        q_real=d_q.real,
        q_imag=-d_q.imag,
        gamma_real=d_gamma.real,
        gamma_imag=-d_gamma.imag,
        p=(gamma * x_e).real,
        omega=results[0].x_dy.sum(axis=(0, 1)),
    )
    return d_values, d_initial_state
