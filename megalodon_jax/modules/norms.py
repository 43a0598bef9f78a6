"""RMSNorm and LayerNorm whose learned scale is stored minus one, as in the released weights."""

from collections.abc import Callable

import jax
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import ModelConfig
from megalodon_jax.modules.parameters import parameter
from megalodon_jax.parallel.sharding import axis_size, partition_spec, shard_map_logical
from megalodon_jax.typing import Array, Float
from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.rowwise import layer_norm, rms_norm


def rms_normalize(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 (float64 if x is)."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), computed in float32, returned in `config.dtype`."""

    def __init__(self, config: ModelConfig):
        self.eps = config.norm_eps
        self.dtype = config.dtype
        self.implementation: Implementation | None = config.implementation_of("rowwise")
        zeros = jnp.zeros(config.model_dim, config.param_dtype)
        self.weight = parameter(zeros, "channels") if config.norm_affine else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        def normalize(x, scale) -> Array:
            return rms_norm(
                x, scale, eps=self.eps, dtype=self.dtype, implementation=self.implementation
            )

        return _of_rows(normalize, x, _scale(self.weight, x))


class LayerNorm(nnx.Module):
    """(z - mean) / sqrt(var + eps) * (1 + weight) + bias, in float32; returns `config.dtype`."""

    def __init__(self, config: ModelConfig):
        self.eps = config.norm_eps
        self.dtype = config.dtype
        self.implementation: Implementation | None = config.implementation_of("rowwise")
        zeros = jnp.zeros(config.model_dim, config.param_dtype)
        self.weight = parameter(zeros, "channels") if config.norm_affine else None
        self.bias = parameter(zeros, "channels") if config.norm_affine else None

    def __call__(
        self,
        x: Float[Array, "... D"],
        *,
        added: Float[Array, "... D"] | None = None,
        offset: Float[Array, " D"] | None = None,
    ) -> Float[Array, "... D"]:
        """Normalizes z = x + added + offset."""

        def normalize(x, scale, bias, added, offset) -> Array:
            return layer_norm(
                x,
                scale,
                bias,
                added=added,
                offset=offset,
                eps=self.eps,
                dtype=self.dtype,
                implementation=self.implementation,
            )

        bias = None if self.bias is None else self.bias[...]
        return _of_rows(normalize, x, _scale(self.weight, x), bias, added, offset)


def _of_rows(function: Callable[..., Array], x: Array, *others: Array | None) -> Array:
    """`function` of x and of arrays like it or of its width, on every device's own rows."""
    if x.ndim != 3 or axis_size("model") > 1:
        # Rows are split over devices: the compiler adds up their sums.
        return function(x, *others)
    tokens, vector = partition_spec("batch", "length", None), partition_spec(None)
    places = [None if a is None else tokens if a.ndim == 3 else vector for a in others]
    return shard_map_logical(function, inputs=(tokens, *places), outputs=tokens)(x, *others)


def _scale(weight: nnx.Param | None, x: Array) -> Float[Array, " D"] | None:
    if weight is None:
        return None
    return 1.0 + weight[...].astype(jnp.promote_types(x.dtype, jnp.float32))
