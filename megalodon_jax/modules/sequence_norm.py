"""SequenceNorm: group normalization by the moments of a whole document, for encoders."""

from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from megalodon_jax.modules.documents import at_tokens, document_lengths, is_token, sum_documents
from megalodon_jax.modules.matmul import STATISTICS
from megalodon_jax.modules.parameters import parameter
from megalodon_jax.modules.precision import at_least_float32
from megalodon_jax.parallel.sharding import (
    axis_size,
    partition_spec,
    sequence_axis,
    shard_map_logical,
)
from megalodon_jax.typing import Array, Float, Int32


class SequenceNorm(nnx.Module):
    """GroupNorm over time: y = (x - mean) / sqrt(var + eps) * (1 + weight) + bias.

    Mean and population variance are those of all features of a group in all tokens of the document
    (Ma et al. 2024, appendix C, as in the authors' encoders); TimestepNorm has those of the tokens
    so far. There is no running average: training and evaluation are the same.

    Args:
      features: channels D.
      num_groups: groups G, which divide D; None: every channel is a group.
      eps: added to the variance.
      dtype: of the result; moments are float32, float64 for float64 features.
      param_dtype: of `weight` and `bias`.
      rngs: not used; initial values are constants.

    Example:
      y = SequenceNorm(32, num_groups=4)(x)
    """

    def __init__(
        self,
        features: int,
        *,
        num_groups: int | None = None,
        eps: float = 1e-5,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        if num_groups is not None and features % num_groups:
            raise ValueError(f"{features} features do not divide into {num_groups} groups")
        self.num_groups = features if num_groups is None else num_groups
        self.eps = eps
        self.dtype = jnp.dtype(dtype)
        self.weight = parameter(jnp.zeros(features, param_dtype), "channels")
        self.bias = parameter(jnp.zeros(features, param_dtype), "channels")

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        lengths: Int32[Array, "B M"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Normalizes x.

        Args:
          x: features.
          segment_ids: documents of each row, numbered from 1; 0 is padding, which does not count
            and becomes 0. None: every row is one document.
          lengths: tokens of the documents, from `document_lengths`; the result is NaN where a row
            has more than M documents. None: any number of documents.
        """
        if segment_ids is not None and lengths is None:
            lengths = document_lengths(segment_ids, x.shape[1])
        options = _Options(
            self.num_groups // axis_size("model"), self.eps, self.dtype, sequence_axis(), x.shape[1]
        )
        wide = at_least_float32(x.dtype)
        tokens = partition_spec("batch", "length", "channels")
        channels = partition_spec("channels")
        return shard_map_logical(
            partial(_sequence_norm, options),
            in_specs=(
                tokens,
                channels,
                channels,
                None if segment_ids is None else partition_spec("batch", "length"),
                None if lengths is None else partition_spec("batch"),
            ),
            out_specs=tokens,
        )(
            x,
            1.0 + self.weight[...].astype(wide),
            self.bias[...].astype(wide),
            segment_ids,
            lengths,
        )


class _Options(NamedTuple):
    """Settings of a call: groups and length are those of a device and of a whole row."""

    num_groups: int
    eps: float
    dtype: DTypeLike
    axis: str | None
    row_length: int


class _Moments(NamedTuple):
    """Mean and 1 / sqrt(var + eps) of the groups of every document."""

    mean: Float[Array, "B M G"]
    inverse_std: Float[Array, "B M G"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sequence_norm(
    options: _Options,
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    segment_ids: Int32[Array, "B L"] | None,
    lengths: Int32[Array, "B M"] | None,
) -> Float[Array, "B L D"]:
    return _forward(options, x, scale, bias, segment_ids, lengths)[0]


def _forward(options: _Options, x, scale, bias, segment_ids, lengths):
    moments = checkpoint_name(_moments(options, x, segment_ids, lengths), STATISTICS)
    y = _normalized(options, x, moments, segment_ids) * scale + bias
    y = jnp.where(is_token(segment_ids), y, 0).astype(options.dtype)
    # An empty array carries the bias's dtype to the backward pass.
    return y, (x, scale, bias[:0], segment_ids, lengths, moments)


def _backward(options: _Options, residuals: Any, dy: Array):
    x, scale, like_bias, segment_ids, lengths, moments = residuals
    normed = _normalized(options, x, moments, segment_ids)
    dy = jnp.where(is_token(segment_ids), dy.astype(normed.dtype), 0)
    # Padding may hold anything: 0 times NaN is NaN.
    normed = jnp.where(is_token(segment_ids), normed, 0)
    g = dy * scale
    sums = _group_sums(options, (g, g * normed), segment_ids, lengths)
    g_mean, dot = (s / _counts(options, x, lengths) for s in sums)
    r = _spread(options, moments.inverse_std, x, segment_ids)
    dx = r * (
        g
        - _spread(options, g_mean, x, segment_ids)
        - normed * _spread(options, dot, x, segment_ids)
    )
    dx = jnp.where(is_token(segment_ids), dx, 0)
    d_scale, d_bias = jnp.sum(dy * normed, axis=(0, 1)), jnp.sum(dy, axis=(0, 1))
    return (
        dx.astype(x.dtype),
        d_scale.astype(scale.dtype),
        d_bias.astype(like_bias.dtype),
        None,
        None,
    )


_sequence_norm.defvjp(_forward, _backward)


def _moments(options: _Options, x: Array, segment_ids, lengths) -> _Moments:
    x = x.astype(at_least_float32(x.dtype))
    count = _counts(options, x, lengths)
    (total,) = _group_sums(options, (x,), segment_ids, lengths)
    first_mean = total / count
    # A second pass about the first mean: its rounding would be seen beside a small spread.
    centered = x - _spread(options, first_mean, x, segment_ids)
    total, square = _group_sums(options, (centered, jnp.square(centered)), segment_ids, lengths)
    shift = total / count
    variance = square / count - jnp.square(shift)
    return _Moments(first_mean + shift, jax.lax.rsqrt(variance + options.eps))


def _normalized(options: _Options, x: Array, moments: _Moments, segment_ids) -> Array:
    x = x.astype(at_least_float32(x.dtype))
    centered = x - _spread(options, moments.mean, x, segment_ids)
    return centered * _spread(options, moments.inverse_std, x, segment_ids)


def _counts(options: _Options, x: Array, lengths: Array | None) -> Float[Array, "#B M 1"]:
    """Numbers of every document's group; 1 where there is no document."""
    dtype = at_least_float32(x.dtype)
    lengths = jnp.full((1, 1), options.row_length) if lengths is None else lengths
    width = x.shape[-1] // options.num_groups
    return (jnp.maximum(lengths, 1) * width).astype(dtype)[..., None]


def _group_sums(
    options: _Options, values: tuple[Array, ...], segment_ids, lengths
) -> list[Float[Array, "B M G"]]:
    """The sums of several arrays over documents and groups, by one exchange."""
    B, L, _ = values[0].shape
    by_token = [jnp.sum(v.reshape(B, L, options.num_groups, -1), axis=-1) for v in values]
    max_documents = 1 if lengths is None else lengths.shape[1]
    joined = jnp.concatenate(by_token, axis=-1)
    sums = sum_documents(joined, segment_ids, max_documents, axis=options.axis)
    return jnp.split(sums, len(values), axis=-1)


def _spread(options: _Options, table: Float[Array, "B M G"], x: Array, segment_ids) -> Array:
    """A group's value at the channels and tokens of its document."""
    values = at_tokens(table, segment_ids)
    return jnp.repeat(values, x.shape[-1] // options.num_groups, axis=-1)
