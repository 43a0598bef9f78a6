"""RMSNorm and LayerNorm of rows whose channels are sharded over a mesh axis.

Inside `shard_map`. Each device reads its part of a row once for partial statistics, one small
exchange gives those of the whole row, a second pass applies them; the same in the backward pass.
LayerNorm's variance is the sum of squares about the mean, combined between channels and between
devices by the formula of Chan et al. (1979): no difference of large numbers.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from megalodon_jax.modules.matmul import STATISTICS
from megalodon_jax.typing import Array, Float, Float32


class NormOptions(NamedTuple):
    """Settings of a norm, which have no gradients.

    Attributes:
      eps: added to the variance or the mean square.
      dtype: of the result.
      axis: mesh axis over which channels are sharded.
    """

    eps: float
    dtype: DTypeLike
    axis: str


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sharded_rms_norm(
    options: NormOptions, x: Float[Array, "B L D"], scale: Float[Array, " D"] | None
) -> Float[Array, "B L D"]:
    """x / sqrt(mean(x^2) + eps) * scale, the mean over the channels of all devices."""
    return _rms_forward(options, x, scale)[0]


def _rms_forward(options: NormOptions, x: Array, scale: Array | None):
    wide = _widen(x)
    square = _sum_over_channels(options, jnp.square(wide)) / _width(options, x)
    r = checkpoint_name(jax.lax.rsqrt(square + options.eps), STATISTICS)
    return _affine(wide * r, scale, None).astype(options.dtype), (x, scale, r)


def _rms_backward(options: NormOptions, residuals: Any, dy: Array):
    x, scale, r = residuals
    normed, dy = _widen(x) * r, _widen(dy)
    g = _affine(dy, scale, None)
    dot = _sum_over_channels(options, g * normed) / _width(options, x)
    dx = r * (g - normed * dot)
    return dx.astype(x.dtype), _sum_over_rows(dy * normed, scale)


sharded_rms_norm.defvjp(_rms_forward, _rms_backward)


class LayerNormVectors(NamedTuple):
    """LayerNorm's terms and factors of every channel; None: 0, 1 and 0."""

    offset: Float[Array, " D"] | None
    scale: Float[Array, " D"] | None
    bias: Float[Array, " D"] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sharded_layer_norm(
    options: NormOptions,
    x: Float[Array, "B L D"],
    added: Float[Array, "B L D"] | None,
    vectors: LayerNormVectors,
) -> Float[Array, "B L D"]:
    """(z - mean) / sqrt(var + eps) * scale + bias of z = x + added + offset."""
    return _layer_forward(options, x, added, vectors)[0]


def _layer_forward(options: NormOptions, x: Array, added: Array | None, vectors: LayerNormVectors):
    z = _sum(x, added, vectors.offset)
    mean, square_sum = _moments(z)
    gathered = jax.lax.all_gather(jnp.stack([mean, square_sum]), options.axis)
    means, square_sums = gathered[:, 0], gathered[:, 1]
    mean = means.mean(axis=0)
    between = z.shape[-1] * jnp.square(means - mean)
    variance = (square_sums + between).sum(axis=0) / _width(options, x)
    r = jax.lax.rsqrt(variance + options.eps)
    mean, r = checkpoint_name((mean[..., None], r[..., None]), STATISTICS)
    y = _affine((z - mean) * r, vectors.scale, vectors.bias)
    return y.astype(options.dtype), (x, added, vectors, mean, r)


def _layer_backward(options: NormOptions, residuals: Any, dy: Array):
    x, added, vectors, mean, r = residuals
    normed = (_sum(x, added, vectors.offset) - mean) * r
    dy = _widen(dy)
    g = _affine(dy, vectors.scale, None)
    sums = jnp.stack([jnp.sum(a, axis=-1, keepdims=True) for a in (g, g * normed)])
    g_mean, dot = jax.lax.psum(sums, options.axis) / _width(options, x)
    dz = r * (g - g_mean - normed * dot)
    d_vectors = LayerNormVectors(
        _sum_over_rows(dz, vectors.offset),
        _sum_over_rows(dy * normed, vectors.scale),
        _sum_over_rows(dy, vectors.bias),
    )
    return dz.astype(x.dtype), None if added is None else dz.astype(added.dtype), d_vectors


sharded_layer_norm.defvjp(_layer_forward, _layer_backward)


def _moments(z: Float[Array, "B L D"]) -> tuple[Float32[Array, "B L"], Float32[Array, "B L"]]:
    """Mean of the local channels and sum of squares about it, in one pass."""

    def combine(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        (mean_a, square_a, count_a), (mean_b, square_b, count_b) = a, b
        count = count_a + count_b
        # Empty groups, the initial values, have a count of 0.
        fraction = count_b / jnp.maximum(count, 1)
        difference = mean_b - mean_a
        mean = mean_a + difference * fraction
        square = square_a + square_b + difference * difference * count_a * fraction
        return mean, square, count

    zero = jnp.zeros((), z.dtype)
    operands = (z, jnp.zeros_like(z), jnp.ones_like(z))
    mean, square_sum, _ = jax.lax.reduce(operands, (zero,) * 3, combine, (z.ndim - 1,))
    return mean, square_sum


def _sum(x: Array, added: Array | None, offset: Array | None) -> Array:
    x = _widen(x)
    if added is not None:
        return x + _affine(_widen(added), None, offset)
    return _affine(x, None, offset)


def _affine(x: Array, scale: Array | None, bias: Array | None) -> Array:
    x = x if scale is None else x * scale.astype(x.dtype)
    return x if bias is None else x + bias.astype(x.dtype)


def _widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _width(options: NormOptions, x: Array) -> int:
    return x.shape[-1] * jax.lax.axis_size(options.axis)


def _sum_over_channels(options: NormOptions, terms: Array) -> Array:
    return jax.lax.psum(jnp.sum(terms, axis=-1, keepdims=True), options.axis)


def _sum_over_rows(terms: Array, vector: Array | None) -> Array | None:
    if vector is None:
        return None
    return jnp.sum(terms, axis=tuple(range(terms.ndim - 1))).astype(vector.dtype)
