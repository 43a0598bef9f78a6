"""The row operations in plain JAX on whole arrays: float32 inside (float64 for float64 rows)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*R W"], scale: Float[Array, " W"] | None, *, eps: float, dtype: Any
) -> Float[Array, "*R W"]:
    """x / sqrt(mean(x^2) + eps) * scale."""
    x = _widen(x)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return (y if scale is None else y * scale.astype(y.dtype)).astype(dtype)


def layer_norm(
    x: Float[Array, "*R W"],
    scale: Float[Array, " W"] | None,
    bias: Float[Array, " W"] | None,
    *,
    added: Float[Array, "*R W"] | None,
    offset: Float[Array, " W"] | None,
    eps: float,
    dtype: Any,
) -> Float[Array, "*R W"]:
    """(z - mean) / sqrt(var + eps) * scale + bias of z = x + (added + offset)."""
    x = _widen(x)
    if added is not None:
        x = x + _add(_widen(added), offset)
    else:
        x = _add(x, offset)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale.astype(y.dtype)
    return _add(y, bias).astype(dtype)


def silu(
    x: Float[Array, "*R W"], bias: Float[Array, " W"] | None, *, dtype: Any
) -> Float[Array, "*R W"]:
    """z * sigmoid(z) of z = x + bias."""
    return jax.nn.silu(_add(_widen(x), bias)).astype(dtype)


def silu_gate(
    x: Float[Array, "*R W"],
    bias: Float[Array, " W"] | None,
    y: Float[Array, "*R W"],
    *,
    dtype: Any,
) -> Float[Array, "*R W"]:
    """y * silu(x + bias)."""
    return (_widen(y) * jax.nn.silu(_add(_widen(x), bias))).astype(dtype)


def _widen(rows: Array) -> Array:
    return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))


def _add(rows: Array, vector: Array | None) -> Array:
    return rows if vector is None else rows + vector.astype(rows.dtype)
