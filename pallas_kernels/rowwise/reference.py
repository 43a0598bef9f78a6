"""The row operations by their definitions, one row at a time: float32 inside, float64-capable."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*R W"], scale: Float[Array, " W"] | None, *, eps: float, dtype: Any
) -> Float[Array, "*R W"]:
    """x / sqrt(mean(x^2) + eps) * scale."""

    def normalize(x: Float[Array, " W"]) -> Float[Array, " W"]:
        y = x / jnp.sqrt(jnp.mean(x**2) + eps)
        return y if scale is None else y * scale

    return _apply_to_rows(normalize, x).astype(dtype)


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
    """(z - mean) / sqrt(var + eps) * scale + bias of z = x + added + offset."""

    def normalize(x: Float[Array, " W"], *added: Float[Array, " W"]) -> Float[Array, " W"]:
        z = sum(added, x)
        z = z if offset is None else z + offset
        mean = jnp.mean(z)
        variance = jnp.mean((z - mean) ** 2)
        y = (z - mean) / jnp.sqrt(variance + eps)
        y = y if scale is None else y * scale
        return y if bias is None else y + bias

    rows = (x,) if added is None else (x, added)
    return _apply_to_rows(normalize, *rows).astype(dtype)


def silu(
    x: Float[Array, "*R W"], bias: Float[Array, " W"] | None, *, dtype: Any
) -> Float[Array, "*R W"]:
    """z * sigmoid(z) of z = x + bias."""
    return _apply_to_rows(lambda x: _silu(x, bias), x).astype(dtype)


def silu_gate(
    x: Float[Array, "*R W"],
    bias: Float[Array, " W"] | None,
    y: Float[Array, "*R W"],
    *,
    dtype: Any,
) -> Float[Array, "*R W"]:
    """y * silu(x + bias)."""
    return _apply_to_rows(lambda x, y: y * _silu(x, bias), x, y).astype(dtype)


def _silu(x: Float[Array, " W"], bias: Float[Array, " W"] | None) -> Float[Array, " W"]:
    z = x if bias is None else x + bias
    return z * jax.nn.sigmoid(z)


def _apply_to_rows(
    function: Callable[..., Array], *rows: Float[Array, "*R W"]
) -> Float[Array, "*R W"]:
    """`function` of single rows, in float32 at least."""
    signature = ",".join(["(w)"] * len(rows)) + "->(w)"
    wide = [row.astype(jnp.promote_types(row.dtype, jnp.float32)) for row in rows]
    return jnp.vectorize(function, signature=signature)(*wide)
