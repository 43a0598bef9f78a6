"""The row operations by Triton: checks, and the custom gradients of norms and gates."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.target import is_interpreted
from pallas_kernels.common.triton import check_triton
from pallas_kernels.rowwise.triton.block_sizes import MAX_NORM_WIDTH
from pallas_kernels.rowwise.triton.launch import (
    gate_width,
    launch_gate_backward,
    launch_gate_forward,
    launch_norm_backward,
    launch_norm_forward,
)
from pallas_kernels.rowwise.types import NORMS, Rows, RowwiseOperation


def rms_norm(
    x: Float[Array, "*R W"], scale: Float[Array, " W"] | None, *, eps: float, dtype: Any
) -> Float[Array, "*R W"]:
    """x / sqrt(mean(x^2) + eps) * scale."""
    return _run_norm("rms_norm", (x, None), (None, scale, None), eps, dtype)


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
    return _run_norm("layer_norm", (x, added), (offset, scale, bias), eps, dtype)


def silu(
    x: Float[Array, "*R W"], bias: Float[Array, " W"] | None, *, dtype: Any
) -> Float[Array, "*R W"]:
    """z * sigmoid(z) of z = x + bias."""
    return _run_gate("silu", (x, None), bias, dtype)


def silu_gate(
    x: Float[Array, "*R W"],
    bias: Float[Array, " W"] | None,
    y: Float[Array, "*R W"],
    *,
    dtype: Any,
) -> Float[Array, "*R W"]:
    """y * silu(x + bias)."""
    return _run_gate("silu_gate", (x, y), bias, dtype)


def find_obstacle(operation: RowwiseOperation, rows: Rows) -> str | None:
    """The reason why the kernels cannot take these rows; None if they can."""
    dtypes = {row.dtype for row in rows if row is not None}
    if len(dtypes) > 1 or dtypes & {jnp.dtype(jnp.float64)}:
        return f"takes rows of one dtype, up to float32, these are {sorted(map(str, dtypes))}"
    if not rows[0].size:
        return f"needs at least one row, got {rows[0].shape}"
    width = rows[0].shape[-1]
    if operation in NORMS and width > MAX_NORM_WIDTH:
        return f"keeps rows of up to {MAX_NORM_WIDTH} numbers in registers, these have {width}"
    return None


class _CallOptions(NamedTuple):
    operation: RowwiseOperation
    eps: float
    dtype: Any
    interpret: bool

    @property
    def centered(self) -> bool:
        return self.operation == "layer_norm"


def _check(operation: RowwiseOperation, rows: Rows) -> None:
    check_triton("triton")
    obstacle = find_obstacle(operation, rows)
    if obstacle is not None:
        raise ValueError(f"{operation}: triton {obstacle}; use implementation 'xla' or None")


def _run_norm(operation: RowwiseOperation, rows: Any, vectors: Any, eps: float, dtype: Any):
    _check(operation, rows)
    options = _CallOptions(operation, eps, jnp.dtype(dtype), is_interpreted())
    flat = jax.tree.map(lambda row: row.reshape(-1, row.shape[-1]), rows)
    wide = jax.tree.map(lambda vector: vector.astype(jnp.float32), vectors)
    return _norm(options, flat, wide).reshape(rows[0].shape)


def _run_gate(operation: RowwiseOperation, rows: Any, bias: Array | None, dtype: Any):
    _check(operation, rows)
    options = _CallOptions(operation, 0.0, jnp.dtype(dtype), is_interpreted())
    width = rows[0].shape[-1] if bias is not None else gate_width(rows[0].size)
    flat = jax.tree.map(lambda row: row.reshape(-1, width), rows)
    wide = None if bias is None else bias.astype(jnp.float32)
    return _gate(options, flat, wide).reshape(rows[0].shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(options: _CallOptions, rows: Any, vectors: Any) -> Array:
    return _norm_forward(options, rows, vectors)[0]


def _norm_forward(options: _CallOptions, rows: Any, vectors: Any):
    y, means, rstds = launch_norm_forward(
        rows,
        vectors,
        dtype=options.dtype,
        eps=options.eps,
        centered=options.centered,
        interpret=options.interpret,
    )
    return y, (rows, vectors, (means, rstds))


def _norm_backward(options: _CallOptions, residuals: Any, dy: Array):
    rows, vectors, moments = residuals
    dx, d_vectors = launch_norm_backward(
        rows, vectors, moments, dy, centered=options.centered, interpret=options.interpret
    )
    return (dx, None if rows[1] is None else dx), tuple(d_vectors)


_norm.defvjp(_norm_forward, _norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gate(options: _CallOptions, rows: Any, bias: Array | None) -> Array:
    return launch_gate_forward(rows, bias, dtype=options.dtype, interpret=options.interpret)


def _gate_forward(options: _CallOptions, rows: Any, bias: Array | None):
    return _gate(options, rows, bias), (rows, bias)


def _gate_backward(options: _CallOptions, residuals: Any, d_out: Array):
    rows, bias = residuals
    dx, dy, d_bias = launch_gate_backward(rows, bias, d_out, interpret=options.interpret)
    return (dx, dy), d_bias


_gate.defvjp(_gate_forward, _gate_backward)
