"""Products of a few rows with a matrix in plain JAX, for any platform."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.skinny_matmul.types import (
    Epilogue,
    Int8Matrix,
    Matrix,
    Part,
    RowNorm,
    starts_of,
)


def skinny_matmul(
    x: Float[Array, "B K"],
    matrix: Matrix,
    norm: RowNorm | None,
    epilogue: Epilogue,
    parts: Sequence[Part],
    dtype: jnp.dtype,
    weight_sums: Float32[Array, " N"] | None = None,
) -> tuple[Array, ...]:
    """A product of the compiler. Arguments as in `api.skinny_matmul`; needs no `weight_sums`."""
    del weight_sums
    if norm is not None:
        x = normalize(x, norm)
    x = x.astype(dtype)
    if isinstance(matrix, Int8Matrix):
        # Integers up to 127 are exact in bfloat16; the scale of a feature leaves the sum.
        y = _multiply(x, matrix.values.astype(dtype)) * matrix.scale
    else:
        y = _multiply(x, matrix)
    y = y if epilogue.bias is None else y + epilogue.bias
    if epilogue.activation == "swiglu":
        hidden, gate = jnp.split(y, 2, axis=1)
        y = jax.nn.silu(hidden) * gate
    elif epilogue.activation == "silu":
        y = jax.nn.silu(y)
    y = y if epilogue.scale is None else y * epilogue.scale
    for added in epilogue.added:
        y = y + added
    return split(y, parts)


def normalize(x: Float[Array, "B K"], norm: RowNorm) -> Float[Array, "B K"]:
    """The norm in float32, or in float64 for float64 rows."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if norm.kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + norm.eps)


def _multiply(x: Float[Array, "B K"], matrix: Float[Array, "N K"]) -> Float[Array, "B N"]:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, matrix, (((1,), (1,)), ((), ())), preferred_element_type=wide)


def split(y: Float[Array, "B M"], parts: Sequence[Part]) -> tuple[Array, ...]:
    """The parts of the output features, in their dtypes."""
    results = []
    for part, start in zip(parts, starts_of(parts), strict=False):
        columns = y[:, start : start + part.width]
        if part.is_swapped:
            columns = columns.reshape(len(y), -1, 2)[..., ::-1].reshape(columns.shape)
        results.append(columns.astype(part.dtype))
    return tuple(results)
