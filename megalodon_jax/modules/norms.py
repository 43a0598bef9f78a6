"""RMSNorm and LayerNorm whose learned scale is stored minus one, as in the released weights."""

from collections.abc import Callable
from typing import Self

import jax
from flax import nnx
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from megalodon_jax.config import ModelConfig
from megalodon_jax.modules.matmul import ACTIVATION
from megalodon_jax.modules.parameters import parameter
from megalodon_jax.modules.precision import at_least_float32
from megalodon_jax.modules.sharded_norms import (
    LayerNormVectors,
    NormOptions,
    sharded_layer_norm,
    sharded_rms_norm,
)
from megalodon_jax.parallel.sharding import axis_size, partition_spec, shard_map_logical
from megalodon_jax.typing import Array, Float
from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.rowwise import layer_norm, rms_norm


def rms_normalize(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 (float64 if x is)."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x / max(|x|, 1e-5) over the last axis, in float32 at least; the gradient at 0 is finite."""
    x = x.astype(at_least_float32(x.dtype))
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-10))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight) over the last axis, computed in float32.

    Args:
      features: width D of the last axis.
      eps: added to the mean.
      affine: whether `weight` is there.
      dtype: of the result.
      param_dtype: of `weight`.
      implementation: see `pallas_kernels.rowwise.rms_norm`; None: the fastest known.
      rngs: not used; initial values are constants.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        self.eps = eps
        self.dtype = jnp.dtype(dtype)
        self.implementation: Implementation | None = implementation
        self.weight = parameter(jnp.zeros(features, param_dtype), "channels") if affine else None

    @classmethod
    def from_config(cls, config: ModelConfig, *, rngs: nnx.Rngs | None = None) -> Self:
        """The RMSNorm behind a model's CEMA."""
        return cls(
            config.model_dim,
            eps=config.norm_eps,
            affine=config.norm_affine,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            implementation=config.implementation_of("rowwise"),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalizes the last axis of x."""

        def normalize(x, scale) -> Array:
            if _channels_are_sharded(x):
                return sharded_rms_norm(NormOptions(self.eps, self.dtype, "model"), x, scale)
            return rms_norm(
                x, scale, eps=self.eps, dtype=self.dtype, implementation=self.implementation
            )

        return _map_rows(normalize, x, _scale(self.weight, x))


class LayerNorm(nnx.Module):
    """(z - mean) / sqrt(var + eps) * (1 + weight) + bias over the last axis, in float32.

    Args:
      features: width D of the last axis.
      eps: added to the variance.
      affine: whether `weight` and `bias` are there.
      dtype: of the result.
      param_dtype: of `weight` and `bias`.
      implementation: see `pallas_kernels.rowwise.layer_norm`; None: the fastest known.
      rngs: not used; initial values are constants.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        self.eps = eps
        self.dtype = jnp.dtype(dtype)
        self.implementation: Implementation | None = implementation
        zeros = jnp.zeros(features, param_dtype)
        self.weight = parameter(zeros, "channels") if affine else None
        self.bias = parameter(zeros, "channels") if affine else None

    @classmethod
    def from_config(cls, config: ModelConfig, *, rngs: nnx.Rngs | None = None) -> Self:
        """The LayerNorm before a model's feed-forward network."""
        return cls(
            config.model_dim,
            eps=config.norm_eps,
            affine=config.norm_affine,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            implementation=config.implementation_of("rowwise"),
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "... D"],
        *,
        added: Float[Array, "... D"] | None = None,
        offset: Float[Array, " D"] | None = None,
    ) -> Float[Array, "... D"]:
        """Normalizes z = x + added + offset; the kernel forms the sum, so z is never stored."""

        def normalize(x, scale, bias, added, offset) -> Array:
            if _channels_are_sharded(x):
                options = NormOptions(self.eps, self.dtype, "model")
                return sharded_layer_norm(options, x, added, LayerNormVectors(offset, scale, bias))
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
        return _map_rows(normalize, x, _scale(self.weight, x), bias, added, offset)


def _map_rows(function: Callable[..., Array], x: Array, *operands: Array | None) -> Array:
    """`function(x, *operands)` on each device's own tokens; operands are like x or vectors."""
    if x.ndim != 3:
        return checkpoint_name(function(x, *operands), ACTIVATION)
    channels = "channels" if _channels_are_sharded(x) else None
    tokens, vector = partition_spec("batch", "length", channels), partition_spec(channels)
    specs = [None if a is None else tokens if a.ndim == 3 else vector for a in operands]
    over_shards = shard_map_logical(function, in_specs=(tokens, *specs), out_specs=tokens)
    return checkpoint_name(over_shards(x, *operands), ACTIVATION)


def _channels_are_sharded(x: Array) -> bool:
    return x.ndim == 3 and axis_size("model") > 1


def _scale(weight: nnx.Param | None, x: Array) -> Float[Array, " D"] | None:
    if weight is None:
        return None
    return 1.0 + weight[...].astype(jnp.promote_types(x.dtype, jnp.float32))
