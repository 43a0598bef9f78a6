"""The public functions on rows."""

from typing import Any, get_args

from jaxtyping import Array, Float

from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.common.target import find_target
from pallas_kernels.rowwise import xla
from pallas_kernels.rowwise.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.rowwise.mosaic_gpu.block_sizes import DEFAULT_WIDTH, SMALLEST_SIZE


def rms_norm(
    x: Float[Array, "*R W"],
    scale: Float[Array, " W"] | None,
    *,
    eps: float,
    dtype: Any,
    implementation: Implementation | None = None,
) -> Float[Array, "*R W"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis.

    Args:
      x: rows, bfloat16, float32 or float64; the result is computed in float32 or float64.
      scale: the multiplier itself; None: 1.
      eps: added to the mean.
      dtype: of the result.
      implementation: "xla", for every platform and type; "mosaic_gpu", kernels for NVIDIA Hopper
        and bfloat16 rows of a multiple of 128 numbers; or None for the fastest known here.

    Raises:
      ValueError: shapes do not fit together, or the implementation does not exist or cannot run.
    """
    operation = mosaic_gpu.RmsNorm(x.shape[-1], eps)
    if _choose(operation, implementation, (x,), (scale,)) == "mosaic_gpu":
        return mosaic_gpu.apply(operation, (x,), (scale,), dtype=dtype)
    return xla.rms_norm(x, scale, eps=eps, dtype=dtype)


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
      scale: the multiplier itself; None: 1.
      bias: None: 0.
      added: more rows, such as a matrix product; None: 0.
      offset: added to every row, such as that product's bias; None: 0.
      eps: added to the variance.
      dtype: of the result.
      implementation: as in `rms_norm`.

    Raises:
      ValueError: as `rms_norm`.
    """
    operation = mosaic_gpu.LayerNorm(x.shape[-1], eps)
    rows, vectors = (x, added), (offset, scale, bias)
    if _choose(operation, implementation, rows, vectors) == "mosaic_gpu":
        return mosaic_gpu.apply(operation, rows, vectors, dtype=dtype)
    return xla.layer_norm(x, scale, bias, added=added, offset=offset, eps=eps, dtype=dtype)


def silu(
    x: Float[Array, "*R W"],
    bias: Float[Array, " W"] | None,
    *,
    dtype: Any,
    implementation: Implementation | None = None,
) -> Float[Array, "*R W"]:
    """The function z / (1 + exp(-z)) of z = x + bias.

    Args:
      x: rows, as in `rms_norm`.
      bias: None: 0.
      dtype: of the result.
      implementation: as in `rms_norm`.

    Raises:
      ValueError: as `rms_norm`.
    """
    operation = mosaic_gpu.Silu()
    if _choose(operation, implementation, (x,), (bias,)) == "mosaic_gpu":
        return mosaic_gpu.apply(operation, (x,), (bias,), dtype=dtype)
    return xla.silu(x, bias, dtype=dtype)


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
      bias: None: 0.
      y: rows that pass it.
      dtype: of the result.
      implementation: as in `rms_norm`.

    Raises:
      ValueError: as `rms_norm`.
    """
    operation = mosaic_gpu.SiluGate()
    if _choose(operation, implementation, (x, y), (bias,)) == "mosaic_gpu":
        return mosaic_gpu.apply(operation, (x, y), (bias,), dtype=dtype)
    return xla.silu_gate(x, bias, y, dtype=dtype)


def _choose(
    operation: mosaic_gpu.Operation,
    implementation: str | None,
    rows: mosaic_gpu.Rows,
    vectors: mosaic_gpu.Vectors,
) -> str:
    """The implementation asked for, or the fastest by measurement (README.md)."""
    known = get_args(Implementation)
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"{operation.name} has no implementation {implementation!r}; use one of "
            f"{', '.join(known)} or None"
        )
    shape = rows[0].shape
    for row in rows:
        if row is not None and row.shape != shape:
            raise ValueError(f"{operation.name}: rows have shapes {shape} and {row.shape}")
    for vector in vectors:
        if vector is not None and vector.shape != shape[-1:]:
            raise ValueError(
                f"{operation.name}: a vector has shape {vector.shape}, rows {shape} need "
                f"{shape[-1:]}"
            )
    if implementation is not None:
        return implementation
    # Without moments or sums over rows there is nothing that XLA does not do as well.
    gains = operation.num_moments > 0 or any(vector is not None for vector in vectors)
    fits = rows[0].size >= SMALLEST_SIZE and shape[-1] % DEFAULT_WIDTH == 0
    runs = find_target().is_hopper and mosaic_gpu.find_obstacle(operation, rows) is None
    return "mosaic_gpu" if gains and fits and runs else "xla"
