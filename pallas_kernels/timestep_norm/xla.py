"""TimestepNorm for any platform: running sums over tokens, with a hand-derived backward pass.

README.md derives both passes. Each direction makes two passes over x; everything else works on
(B, L, G) numbers. Sums are of differences from a pivot near the data, and of squares that are never
negative, so that large offsets do not cancel.
"""

import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.residuals import name_residuals
from pallas_kernels.timestep_norm.positions import (
    DocumentPositions,
    document_positions,
    token_counts,
)
from pallas_kernels.timestep_norm.types import (
    MeanVar,
    TimestepNormOutput,
    TimestepNormState,
    moments_dtype,
)


def timestep_norm(
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    num_groups: int,
    eps: float,
    initial_state: TimestepNormState,
    prior: TimestepNormState,
    segment_ids: Int32[Array, "B L"] | None,
) -> TimestepNormOutput:
    """Parallel over tokens. Arguments as in `api.py`, with complete states."""
    position_info = _PositionInfo.make(x.shape, initial_state.count, prior.count, segment_ids)
    y, mean, var = _normalize(
        num_groups, eps, x, scale, bias, initial_state[1:], prior[1:], position_info
    )
    return TimestepNormOutput(y, TimestepNormState(position_info.count[:, -1], mean, var))


class _PositionInfo(NamedTuple):
    """Where every token stands.

    Attributes:
      count: tokens in the state after this one.
      initial_count: tokens in the state before the document's first token.
      documents: positions in packed rows; None if every row is one document without padding.
    """

    count: Int32[Array, "B L"]
    initial_count: Int32[Array, "B #L"]
    documents: DocumentPositions | None

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        initial_count: Int32[Array, " B"],
        prior_count: Int32[Array, ""],
        segment_ids: Int32[Array, "B L"] | None,
    ) -> Self:
        if segment_ids is None:
            tokens = jnp.arange(1, shape[1] + 1, dtype=jnp.int32)
            return cls(initial_count[:, None] + tokens, initial_count[:, None], None)
        documents = document_positions(segment_ids)
        return cls(*token_counts(documents, initial_count, prior_count), documents)


class _Moments(NamedTuple):
    """Moments after every token; the mean is pivot + offset, which keeps the offset's digits."""

    pivot: Float[Array, "B #L G"]
    offset: Float[Array, "B L G"]
    var: Float[Array, "B L G"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(
    num_groups, eps, x, scale, bias, initial: MeanVar, prior: MeanVar, position_info: _PositionInfo
):
    return _normalize_fwd(num_groups, eps, x, scale, bias, initial, prior, position_info)[0]


def _normalize_fwd(
    num_groups, eps, x, scale, bias, initial: MeanVar, prior: MeanVar, position_info: _PositionInfo
):
    groups = _split_groups(x, num_groups)
    pivot, offset, var = _running_moments(groups, initial, prior, position_info)
    rstd = jax.lax.rsqrt(var + eps)
    centered = (groups - pivot[..., None]) - offset[..., None]
    y = (centered * rstd[..., None]).reshape(x.shape) * scale + bias
    y = _zero_padding(y, position_info).astype(x.dtype)

    final_mean, final_var = pivot[:, -1] + offset[:, -1], var[:, -1]
    if position_info.documents is not None:
        has_tokens = position_info.documents.valid.any(axis=1)[:, None]
        final_mean = jnp.where(has_tokens, final_mean, initial[0])
        final_var = jnp.where(has_tokens, final_var, initial[1])
    y, pivot, offset, rstd = name_residuals((y, pivot, offset, rstd), "timestep_norm")
    residuals = x, scale, bias, pivot, offset, rstd, position_info
    return (y, final_mean, final_var), residuals


def _normalize_bwd(num_groups, eps, residuals, cotangents):
    x, scale, bias, pivot, offset, rstd, position_info = residuals
    dy, d_final_mean, d_final_var = cotangents
    dtype = moments_dtype(x.dtype)
    dy = _zero_padding(dy.astype(dtype), position_info)
    g = _split_groups(dy * scale, num_groups)
    centered = (_split_groups(x, num_groups) - pivot[..., None]) - offset[..., None]

    d_mean = -rstd * g.sum(-1)
    d_var = -0.5 * rstd**3 * (g * centered).sum(-1)
    d_mean, d_var, d_padding_rows = _add_final_state(
        d_mean, d_var, d_final_mean, d_final_var, position_info
    )
    count = jnp.maximum(position_info.count, 1).astype(dtype)[..., None]
    mean_sum = _running_sums(position_info, d_mean / count, reverse=True)
    var_sum = _running_sums(position_info, d_var / count, reverse=True)
    # The step of the mean at this token; 0 where no token came before.
    before = (position_info.count - 1).astype(dtype)[..., None]
    mean_step = jnp.where(before > 0, centered.mean(-1) / jnp.maximum(before, 1), 0)
    drift_sum = _running_sums(
        position_info, _zero_padding(mean_step * var_sum, position_info), reverse=True
    )
    drift_after = _at_next_token(drift_sum, position_info)

    dx = (
        g * rstd[..., None]
        + ((mean_sum - 2 * drift_after)[..., None] + 2 * centered * var_sum[..., None])
        / g.shape[-1]
    )
    dx = _zero_padding(dx.reshape(x.shape), position_info).astype(x.dtype)
    initial_count = position_info.initial_count.astype(dtype)[..., None]
    d_document = (initial_count * (mean_sum - 2 * drift_sum), initial_count * var_sum)
    d_initial, d_prior = _split_initial(d_document, d_padding_rows, position_info)

    normalized = (centered * rstd[..., None]).reshape(x.shape)
    d_scale = (dy * normalized).sum((0, 1)).astype(scale.dtype)
    d_bias = dy.sum((0, 1)).astype(bias.dtype)
    return dx, d_scale, d_bias, d_initial, d_prior, None


_normalize.defvjp(_normalize_fwd, _normalize_bwd)


def _running_moments(
    groups: Float[Array, "B L G F"],
    initial: MeanVar,
    prior: MeanVar,
    position_info: _PositionInfo,
) -> _Moments:
    # A float32 mean of numbers far from 0 is rounded; `mean_error` is the lost remainder.
    mean = groups.mean(-1)
    deviation = groups - mean[..., None]
    mean_error = deviation.mean(-1)
    var = jnp.maximum(jnp.square(deviation).mean(-1) - jnp.square(mean_error), 0)

    initial_mean, initial_var = (moment[:, None] for moment in initial)
    first_mean = mean[:, :1]
    documents = position_info.documents
    if documents is not None:
        later = documents.in_later_document[..., None]
        initial_mean = jnp.where(later, prior[0], initial_mean)
        initial_var = jnp.where(later, prior[1], initial_var)
        first_mean = jnp.take_along_axis(mean, documents.first_index[..., None], axis=1)
    initial_count = position_info.initial_count[..., None]
    pivot = jnp.where(initial_count > 0, initial_mean, first_mean)

    count = jnp.maximum(position_info.count, 1).astype(mean.dtype)[..., None]
    difference = _zero_padding((mean - pivot) + mean_error, position_info)
    total = _running_sums(position_info, difference)
    offset = total / count
    before = jnp.pad(offset[:, :-1], ((0, 0), (1, 0), (0, 0)))
    if documents is not None:
        before = jnp.where(documents.is_first_token[..., None], 0, before)
    summand = var + jnp.square(difference - before) * ((count - 1) / count)
    squares = _running_sums(position_info, _zero_padding(summand, position_info))
    return _Moments(pivot, offset, (initial_count * initial_var + squares) / count)


def _running_sums(
    position_info: _PositionInfo, values: Float[Array, "B L G"], reverse: bool = False
) -> Float[Array, "B L G"]:
    """Inclusive sums along each document, from its first token, or from its last one (reverse)."""
    L = values.shape[1]
    index = jnp.arange(L, dtype=jnp.int32)[None]
    documents = position_info.documents
    if documents is None:
        reach = L - 1 - index if reverse else index
    else:
        reach = documents.last_index - index if reverse else index - documents.first_index

    # Doubling steps: on a CPU they take a tenth of `associative_scan`'s time to compile, and run
    # twice as fast as `cumsum`. Selection keeps NaN of other documents out; a product with 0 would
    # not.
    def double(step, sums):
        distance = 1 << step
        shifted = jnp.roll(sums, -distance if reverse else distance, axis=1)
        return sums + jnp.where((reach >= distance)[..., None], shifted, 0)

    return jax.lax.fori_loop(0, (L - 1).bit_length(), double, values)


def _at_next_token(values: Float[Array, "B L G"], position_info: _PositionInfo) -> Array:
    """The value at the next token of the document, 0 at its last one."""
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if position_info.documents is None:
        return following
    is_last = jnp.pad(position_info.documents.is_first_token[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(is_last[..., None], 0, following)


def _add_final_state(
    d_mean, d_var, d_final_mean, d_final_var, position_info: _PositionInfo
) -> tuple[Array, Array, MeanVar]:
    """Adds the final state's cotangents at each row's last token.

    The third result has the cotangents of rows of padding alone: they belong to the initial state.
    """
    if position_info.documents is None:
        zeros = jnp.zeros_like(d_final_mean)
        return d_mean.at[:, -1].add(d_final_mean), d_var.at[:, -1].add(d_final_var), (zeros, zeros)
    valid = position_info.documents.valid
    tokens = jnp.cumsum(valid, axis=1)
    is_last = (valid & (tokens == tokens[:, -1:]))[..., None]
    is_padding_row = tokens[:, -1:] == 0
    return (
        d_mean + jnp.where(is_last, d_final_mean[:, None], 0),
        d_var + jnp.where(is_last, d_final_var[:, None], 0),
        (jnp.where(is_padding_row, d_final_mean, 0), jnp.where(is_padding_row, d_final_var, 0)),
    )


def _split_initial(
    d_document: MeanVar, d_padding_rows: MeanVar, position_info: _PositionInfo
) -> tuple[MeanVar, MeanVar]:
    """Gradients of initial state and prior, from those at every document's first token."""
    if position_info.documents is None:
        d_initial = (
            d_document[0][:, 0] + d_padding_rows[0],
            d_document[1][:, 0] + d_padding_rows[1],
        )
        zeros = jnp.zeros_like(d_padding_rows[0][0])
        return d_initial, (zeros, zeros)
    starts = position_info.documents.is_first_token
    later = position_info.documents.in_later_document
    starts_row, starts_later = (starts & ~later)[..., None], (starts & later)[..., None]
    d_initial, d_prior = [], []
    for moment, of_padding_rows in zip(d_document, d_padding_rows, strict=True):
        d_initial.append(of_padding_rows + jnp.where(starts_row, moment, 0).sum(1))
        d_prior.append(jnp.where(starts_later, moment, 0).sum((0, 1)))
    return (d_initial[0], d_initial[1]), (d_prior[0], d_prior[1])


def _split_groups(x: Float[Array, "B L D"], num_groups: int) -> Float[Array, "B L G F"]:
    B, L, D = x.shape
    return x.astype(moments_dtype(x.dtype)).reshape(B, L, num_groups, D // num_groups)


def _zero_padding(x: Float[Array, "B L D"], position_info: _PositionInfo) -> Array:
    if position_info.documents is None:
        return x
    return jnp.where(position_info.documents.valid[..., None], x, 0)
