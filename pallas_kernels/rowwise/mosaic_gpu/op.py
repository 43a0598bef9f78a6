"""The row operations on Hopper: checks, tilings, and the custom gradient of all four."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.mosaic_gpu import interpret_params
from pallas_kernels.common.target import check_hopper_or_blackwell
from pallas_kernels.rowwise.mosaic_gpu.block_sizes import (
    MAX_NORM_WIDTH,
    THREADS,
    RowTiling,
    choose_tiling,
    widest_gate_tile,
)
from pallas_kernels.rowwise.mosaic_gpu.kernels import LayerNorm, RmsNorm, RowKernel, Silu, SiluGate
from pallas_kernels.rowwise.mosaic_gpu.launch import launch_rows
from pallas_kernels.rowwise.mosaic_gpu.pipeline import RowOperands, RowResults
from pallas_kernels.rowwise.types import NORMS, Rows, RowwiseOperation, Vectors


def rms_norm(
    x: Float[Array, "*R W"], scale: Float[Array, " W"] | None, *, eps: float, dtype: Any
) -> Float[Array, "*R W"]:
    """x / sqrt(mean(x^2) + eps) * scale."""
    return apply(RmsNorm(x.shape[-1], eps), (x,), (scale,), dtype=dtype)


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
    kernel = LayerNorm(x.shape[-1], eps)
    return apply(kernel, (x, added), (offset, scale, bias), dtype=dtype)


def silu(
    x: Float[Array, "*R W"], bias: Float[Array, " W"] | None, *, dtype: Any
) -> Float[Array, "*R W"]:
    """z * sigmoid(z) of z = x + bias."""
    return apply(Silu(), (x,), (bias,), dtype=dtype)


def silu_gate(
    x: Float[Array, "*R W"],
    bias: Float[Array, " W"] | None,
    y: Float[Array, "*R W"],
    *,
    dtype: Any,
) -> Float[Array, "*R W"]:
    """y * silu(x + bias)."""
    return apply(SiluGate(), (x, y), (bias,), dtype=dtype)


def find_obstacle(operation: RowwiseOperation, rows: Rows) -> str | None:
    """The reason why the kernels cannot take these rows; None if they can."""
    dtypes = {row.dtype for row in rows if row is not None}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        return f"takes bfloat16 rows, these are {', '.join(sorted(map(str, dtypes)))}"
    width = rows[0].shape[-1]
    if width % THREADS or not rows[0].size:
        return f"needs a width that is a multiple of {THREADS} and one row, got {rows[0].shape}"
    if operation in NORMS and width > MAX_NORM_WIDTH:
        return f"keeps rows of up to {MAX_NORM_WIDTH} numbers in registers, these have {width}"
    return None


class _CallOptions(NamedTuple):
    kernel: RowKernel
    dtype: Any
    forward: RowTiling
    backward: RowTiling
    interpret: Any


def apply(
    kernel: RowKernel,
    rows: Rows,
    vectors: Vectors,
    *,
    dtype: Any,
    forward: RowTiling | None = None,
    backward: RowTiling | None = None,
) -> Float[Array, "*R W"]:
    """Runs an operation's kernels: one forward, one backward.

    Args:
      kernel: the operation.
      rows: bfloat16, of one shape, in the order of the kernel's docstring.
      vectors: any float dtype but float64.
      dtype: dtype of the result.
      forward: how rows are divided into blocks; None: the measured choice.
      backward: the same for the backward kernel.

    Raises:
      ValueError: a width or dtype that the kernels do not have, or a device that is no Hopper GPU.
    """
    check_hopper_or_blackwell("mosaic_gpu")
    obstacle = find_obstacle(kernel.name, rows)
    if obstacle is not None:
        raise ValueError(f"{kernel.name}: mosaic_gpu {obstacle}; use implementation 'xla' or None")
    width = rows[0].shape[-1]
    if kernel.name not in NORMS and all(vector is None for vector in vectors):
        # Every number is independent: rows may be cut anywhere.
        width = widest_gate_tile(rows[0].size)
    flat = jax.tree.map(lambda row: row.reshape(-1, width), rows)
    wide = jax.tree.map(lambda vector: vector.astype(jnp.float32), vectors)
    options = _CallOptions(
        kernel,
        jnp.dtype(dtype),
        forward or choose_tiling(kernel.name, width, backward=False),
        backward or choose_tiling(kernel.name, width, backward=True),
        interpret_params(),
    )
    return _apply(options, flat, wide).reshape(rows[0].shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(options: _CallOptions, rows: tuple, vectors: tuple) -> Array:
    return _forward(options, rows, vectors)[0]


def _forward(options: _CallOptions, rows: tuple, vectors: tuple):
    kernel = options.kernel
    results = launch_rows(
        kernel.forward,
        RowOperands(rows, vectors),
        RowResults((options.dtype,), moments=(jnp.float32,) * kernel.num_moments),
        options.forward,
        name=f"rowwise_{kernel.name}_forward",
        interpret=options.interpret,
    )
    return results.rows[0], (rows, vectors, results.moments)


def _backward(options: _CallOptions, residuals: tuple, cotangent: Array):
    rows, vectors, moments = residuals
    kernel = options.kernel
    results = launch_rows(
        kernel.backward,
        RowOperands((*rows, cotangent), vectors, moments),
        RowResults(
            (rows[0].dtype,) * kernel.num_gradients,
            jax.tree.map(lambda vector: vector.dtype, vectors),
        ),
        options.backward,
        name=f"rowwise_{kernel.name}_backward",
        interpret=options.interpret,
    )
    gradients = results.rows if kernel.num_gradients > 1 else results.rows * len(rows)
    gradients = (None if row is None else g for row, g in zip(rows, gradients, strict=True))
    return tuple(gradients), jax.tree.map(lambda sums: sums.sum(axis=0), results.sums)


_apply.defvjp(_forward, _backward)
