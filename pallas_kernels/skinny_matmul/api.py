"""The public function of products of a few rows: check, choose an implementation, call it."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.common.dispatch import Implementation, check_implementation
from pallas_kernels.common.symbolic import has_symbolic_shape
from pallas_kernels.common.target import find_target
from pallas_kernels.skinny_matmul import reference, xla
from pallas_kernels.skinny_matmul.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.skinny_matmul.types import (
    Epilogue,
    Int8Matrix,
    Matrix,
    Part,
    RowNorm,
    check_parts,
    starts_of,
    values_of,
)

# All called as f(x, matrix, norm, epilogue, parts, dtype, weight_sums).
IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, ...]]] = {
    "reference": reference.skinny_matmul,
    "xla": xla.skinny_matmul,
    "mosaic_gpu": mosaic_gpu.skinny_matmul,
}


def skinny_matmul(
    x: Float[Array, "B K"],
    matrix: Matrix,
    *,
    parts: Sequence[Part],
    norm: RowNorm | None = None,
    epilogue: Epilogue = Epilogue(),  # noqa: B008
    dtype: jnp.dtype | None = None,
    weight_sums: Float32[Array, " N"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """y = scale * f(norm(x) Wᵀ + b) + Σ added, for a few rows x: the products of a decoding step.

    Args:
      x: rows, bfloat16, float32 or float64.
      matrix: W, in the dtype of the product or as 8-bit integers.
      parts: widths and dtypes of the results, which share the output features in this order.
      norm: of the rows; None: the rows as they are.
      epilogue: b, f, scale and what is added.
      dtype: operands of the product are rounded to it; None: W's, or x's if W has integers. Sums
        are float32, or float64 for float64. The kernel applies the norm to the sums, and rounds
        no float32 row, up to 16 rows; more float32 rows are rounded after their norm.
      weight_sums: `sum_weights(matrix)`, made once: LayerNorm in the kernels needs it. None: summed
        in every call.
      implementation: "reference" (by definition), "xla" (any platform and dtype), "mosaic_gpu" (one
        kernel for NVIDIA Hopper; bfloat16, up to 64 rows, a multiple of 256 input features, parts
        of a multiple of 8), or None for the fastest known here.

    Returns:
      One array (B, width) for every part.

    Raises:
      ValueError: shapes or dtypes do not fit together, the implementation does not exist or cannot
        run these operands on this device.
    """
    values = values_of(matrix)
    dtype = jnp.dtype(dtype or (x.dtype if isinstance(matrix, Int8Matrix) else values.dtype))
    _check_operands(x, values, epilogue, parts, weight_sums)
    check_implementation("skinny_matmul", implementation, IMPLEMENTATIONS)
    name = implementation or _choose_implementation(x, matrix, parts, dtype)
    return IMPLEMENTATIONS[name](x, matrix, norm, epilogue, parts, dtype, weight_sums)


def _choose_implementation(
    x: Array, matrix: Matrix, parts: Sequence[Part], dtype: jnp.dtype
) -> Implementation:
    """The kernel where it can run: it needs no other ones for the bias and the residuals."""
    if has_symbolic_shape(x):
        return "xla"
    obstacle = mosaic_gpu.find_obstacle(x, matrix, parts, dtype)
    return "mosaic_gpu" if find_target().is_hopper and obstacle is None else "xla"


def _check_operands(
    x: Array,
    values: Array,
    epilogue: Epilogue,
    parts: Sequence[Part],
    weight_sums: Array | None,
) -> None:
    if x.ndim != 2 or values.ndim != 2 or x.shape[1] != values.shape[1]:
        raise ValueError(
            f"x and the matrix have shapes {x.shape} and {values.shape}; expected (B, K) and (N, K)"
        )
    halves = 2 if epilogue.activation == "swiglu" else 1
    if epilogue.activation not in (None, "silu", "swiglu"):
        raise ValueError(f"activation is {epilogue.activation!r}; use 'silu', 'swiglu' or None")
    check_parts(parts)
    width = starts_of(parts)[-1]
    if values.shape[0] != halves * width:
        raise ValueError(
            f"parts have {width} output features together; a matrix of shape {values.shape} gives "
            f"{values.shape[0] // halves}"
        )
    if weight_sums is not None and weight_sums.shape != values.shape[:1]:
        raise ValueError(
            f"weight_sums has shape {weight_sums.shape}; expected {values.shape[:1]}, what "
            f"`sum_weights` makes of the matrix"
        )
    for added in epilogue.added:
        if added.shape != (x.shape[0], width):
            raise ValueError(f"added has shape {added.shape}; expected {(x.shape[0], width)}")
