"""The public functions on rows: check, choose an implementation, call it."""

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.common.dispatch import Implementation, check_implementation
from pallas_kernels.common.measured_choice import find_measured
from pallas_kernels.common.symbolic import has_symbolic_shape
from pallas_kernels.common.target import find_target
from pallas_kernels.rowwise import reference, xla
from pallas_kernels.rowwise.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.rowwise.mosaic_gpu.block_sizes import DEFAULT_WIDTH, SMALLEST_SIZE
from pallas_kernels.rowwise.triton import op as triton
from pallas_kernels.rowwise.types import (
    NORMS,
    Rows,
    RowwiseImplementation,
    RowwiseOperation,
    Vectors,
)

# Modules with the four functions.
IMPLEMENTATIONS: dict[str, RowwiseImplementation] = {
    "reference": reference,
    "xla": xla,
    "mosaic_gpu": mosaic_gpu,
    "triton": triton,
}


def rms_norm(
    x: Float[Array, "*R W"],
    scale: Float[Array, " W"] | None,
    *,
    eps: float,
    dtype: Any,
    implementation: Implementation | None = None,
) -> Float[Array, "*R W"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang and Sennrich 2019).

    Args:
      x: rows, bfloat16, float32 or float64; the result is computed in float32 or float64.
      scale: factor for every column, the multiplier itself; None: 1.
      eps: added to the mean.
      dtype: dtype of the result.
      implementation: "reference" (one row at a time, by definition), "xla" (every platform and
        dtype), "mosaic_gpu" (kernels for NVIDIA Hopper; bfloat16 rows of a multiple of 128
        numbers), "triton" (kernels for NVIDIA GPUs from Ampere on; extra `triton`), or None for
        the fastest known here.

    Raises:
      ValueError: shapes do not fit together, or the implementation does not exist or cannot run
        these operands on this device.
    """
    chosen = _select("rms_norm", implementation, (x,), (scale,))
    return chosen.rms_norm(x, scale, eps=eps, dtype=dtype)


def layer_norm(
    x: Float[Array, "*R W"],
    scale: Float[Array, " W"] | None,
    bias: Float[Array, " W"] | None,
    *,
    added: Float[Array, "*R W"] | None = None,
    offset: Float[Array, " W"] | None = None,
    eps: float,
    dtype: Any,
    implementation: Implementation | None = None,
) -> Float[Array, "*R W"]:
    """(z - mean) / sqrt(var + eps) * scale + bias over the last axis of z = x + added + offset.

    Args:
      x: rows, as in `rms_norm`.
      scale: factor for every column, the multiplier itself; None: 1.
      bias: term for every column; None: 0.
      added: rows to add before the norm, such as a matrix product; None: 0.
      offset: term for every column before the norm, such as that product's bias; None: 0.
      eps: added to the variance.
      dtype: dtype of the result.
      implementation: as in `rms_norm`.

    Raises:
      ValueError: as `rms_norm`.
    """
    chosen = _select("layer_norm", implementation, (x, added), (offset, scale, bias))
    return chosen.layer_norm(x, scale, bias, added=added, offset=offset, eps=eps, dtype=dtype)


def silu(
    x: Float[Array, "*R W"],
    bias: Float[Array, " W"] | None,
    *,
    dtype: Any,
    implementation: Implementation | None = None,
) -> Float[Array, "*R W"]:
    """z * sigmoid(z) of z = x + bias.

    Args:
      x: rows, as in `rms_norm`.
      bias: term for every column; None: 0.
      dtype: dtype of the result.
      implementation: as in `rms_norm`.

    Raises:
      ValueError: as `rms_norm`.
    """
    chosen = _select("silu", implementation, (x,), (bias,))
    return chosen.silu(x, bias, dtype=dtype)


def silu_gate(
    x: Float[Array, "*R W"],
    bias: Float[Array, " W"] | None,
    y: Float[Array, "*R W"],
    *,
    dtype: Any,
    implementation: Implementation | None = None,
) -> Float[Array, "*R W"]:
    """y * silu(x + bias).

    Args:
      x: rows of the gate, as in `rms_norm`.
      bias: term for every column; None: 0.
      y: rows that the gate multiplies.
      dtype: dtype of the result.
      implementation: as in `rms_norm`.

    Raises:
      ValueError: as `rms_norm`.
    """
    chosen = _select("silu_gate", implementation, (x, y), (bias,))
    return chosen.silu_gate(x, bias, y, dtype=dtype)


def _select(
    operation: RowwiseOperation, implementation: str | None, rows: Rows, vectors: Vectors
) -> RowwiseImplementation:
    _check_shapes(operation, rows, vectors)
    check_implementation(operation, implementation, IMPLEMENTATIONS)
    return IMPLEMENTATIONS[implementation or _choose_implementation(operation, rows, vectors)]


def _choose_implementation(
    operation: RowwiseOperation, rows: Rows, vectors: Vectors
) -> Implementation:
    """The fastest by measurement: on the user's device (`megalodon tune`), else in README.md."""
    if has_symbolic_shape(rows[0]):
        return "xla"
    measured = find_measured(operation, rows[0], tokens=rows[0].size // rows[0].shape[-1])
    obstacle = measured == "mosaic_gpu" and mosaic_gpu.find_obstacle(operation, rows)
    if measured is not None and IMPLEMENTATIONS.get(measured) is not None and not obstacle:
        return measured
    # Without sums along rows or over rows, XLA's fused loop is as fast.
    has_sums = operation in NORMS or any(vector is not None for vector in vectors)
    is_large = rows[0].size >= SMALLEST_SIZE and rows[0].shape[-1] % DEFAULT_WIDTH == 0
    can_run = find_target().is_hopper and mosaic_gpu.find_obstacle(operation, rows) is None
    return "mosaic_gpu" if has_sums and is_large and can_run else "xla"


def _check_shapes(operation: RowwiseOperation, rows: Rows, vectors: Vectors) -> None:
    shape = rows[0].shape
    for row in rows:
        if row is not None and row.shape != shape:
            raise ValueError(f"{operation}: rows have shapes {shape} and {row.shape}; use one")
    for vector in vectors:
        if vector is not None and vector.shape != shape[-1:]:
            raise ValueError(
                f"{operation}: a vector has shape {vector.shape}; rows {shape} need {shape[-1:]}"
            )
