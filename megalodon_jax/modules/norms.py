"""RMSNorm and LayerNorm whose learned scale is stored minus one, as in the released weights."""

import jax
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import ModelConfig
from megalodon_jax.modules.parameters import parameter
from megalodon_jax.typing import Array, Float


def rms_normalize(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 (float64 if x is)."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), computed in float32, returned in `config.dtype`."""

    def __init__(self, config: ModelConfig):
        self.eps = config.norm_eps
        self.dtype = config.dtype
        zeros = jnp.zeros(config.model_dim, config.param_dtype)
        self.weight = parameter(zeros, "embed") if config.norm_affine else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = rms_normalize(x, self.eps)
        if self.weight is not None:
            y = y * (1.0 + self.weight[...].astype(y.dtype))
        return y.astype(self.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * (1 + weight) + bias, in float32; returns `config.dtype`."""

    def __init__(self, config: ModelConfig):
        self.eps = config.norm_eps
        self.dtype = config.dtype
        zeros = jnp.zeros(config.model_dim, config.param_dtype)
        self.weight = parameter(zeros, "embed") if config.norm_affine else None
        self.bias = parameter(zeros, "embed") if config.norm_affine else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        if self.weight is not None and self.bias is not None:
            y = y * (1.0 + self.weight[...].astype(y.dtype)) + self.bias[...].astype(y.dtype)
        return y.astype(self.dtype)
