"""Products of a few rows by definition: one row at a time, in float32 or float64."""

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
    """Sums over input features. Arguments as in `api.skinny_matmul`; needs no `weight_sums`."""
    del weight_sums
    wide = jnp.promote_types(dtype, jnp.float32)
    if isinstance(matrix, Int8Matrix):
        weights = matrix.values.astype(wide) * matrix.scale[:, None]
    else:
        weights = matrix.astype(wide)

    def of_row(row: Array, added: list[Array]) -> Array:
        row = row.astype(wide)
        if norm is not None:
            if norm.kind == "layer":
                row = row - jnp.mean(row)
            row = row / jnp.sqrt(jnp.mean(row**2) + norm.eps)
        row = row.astype(dtype).astype(wide)
        y = jnp.sum(weights * row, axis=1)
        y = y + (0.0 if epilogue.bias is None else epilogue.bias)
        if epilogue.activation == "silu":
            y = jax.nn.silu(y)
        elif epilogue.activation == "swiglu":
            half = len(y) // 2
            y = jax.nn.silu(y[:half]) * y[half:]
        y = y * (1.0 if epilogue.scale is None else epilogue.scale)
        return y + sum(added, jnp.zeros_like(y))

    y = jax.vmap(of_row)(x, list(epilogue.added))
    results = []
    for part, start in zip(parts, starts_of(parts), strict=False):
        columns = start + jnp.arange(part.width)
        if part.is_swapped:
            # The other feature of a pair has the index with the last bit inverted.
            columns = start + (jnp.arange(part.width) ^ 1)
        results.append(y[:, columns].astype(part.dtype))
    return tuple(results)
