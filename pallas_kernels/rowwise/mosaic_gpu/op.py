"""The row operations on Hopper: one kernel forward, one backward.

A norm's backward kernel has the moments of its rows from the forward one. With xh = (z - mean) r,
r = 1 / sqrt(var + eps), g = dy scale and means over a row,

    dz = r (g - mean(g) - xh mean(g xh))        dscale = Σ dy xh    dbias = Σ dy    doffset = Σ dz

where Σ is over rows; without mean(g) for RMSNorm. With s = sigmoid(z) of a gate,
d silu(z) / dz = s (1 + z (1 - s)).
"""

import abc
import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.common.target import check_hopper, is_interpreted
from pallas_kernels.rowwise.mosaic_gpu.block_sizes import (
    GATE_TILES,
    GATES,
    MULTIPROCESSORS,
    NORMS,
    WIDEST_NORM,
)
from pallas_kernels.rowwise.mosaic_gpu.kernels import THREADS, Operands, Results, Row, Shape, run

# At least one array; None where an operation can do without.
Rows = tuple[Float[Array, "*R W"], *tuple[Float[Array, "*R W"] | None, ...]]
Vectors = tuple[Float[Array, " W"] | None, ...]


class Operation(abc.ABC):
    """What there is of an operation for one row in registers."""

    name: ClassVar[str]
    num_moments: ClassVar[int]
    """Numbers of a row that `backward` needs."""
    num_gradients: ClassVar[int]
    """Different gradients of rows: those of terms of one sum are the same."""

    @abc.abstractmethod
    def forward(self, operands: Operands) -> Results:
        """One row of the result, and its moments."""

    @abc.abstractmethod
    def backward(self, operands: Operands) -> Results:
        """Gradients of rows, and of vectors as sums; `operands` has the cotangent as last row."""


@dataclasses.dataclass(frozen=True)
class RmsNorm(Operation):
    """Rows (x), vectors (scale), moments (r)."""

    name = "rms_norm"
    num_moments, num_gradients = 1, 1

    width: int
    eps: float

    def forward(self, operands: Operands) -> Results:
        (x,), (scale,), _ = operands
        r = lax.rsqrt(jnp.sum(x * x) * (1 / self.width) + self.eps)
        y = x * r
        return Results((y if scale is None else y * scale,), moments=(r,))

    def backward(self, operands: Operands) -> Results:
        (x, dy), (scale,), (r,) = operands
        x = x * r
        g = dy if scale is None else dy * scale
        dx = r * (g - x * (jnp.sum(g * x) * (1 / self.width)))
        return Results((dx,), (None if scale is None else dy * x,))


@dataclasses.dataclass(frozen=True)
class LayerNorm(Operation):
    """Rows (x, added), vectors (offset, scale, bias), moments (mean, r)."""

    name = "layer_norm"
    num_moments, num_gradients = 2, 1

    width: int
    eps: float

    def forward(self, operands: Operands) -> Results:
        (x, added), (offset, scale, bias), _ = operands
        z = _add(x, added, offset)
        mean = jnp.sum(z) * (1 / self.width)
        z = z - mean
        r = lax.rsqrt(jnp.sum(z * z) * (1 / self.width) + self.eps)
        y = z * r
        y = y if scale is None else y * scale
        return Results((_add(y, bias),), moments=(mean, r))

    def backward(self, operands: Operands) -> Results:
        (x, added, dy), (offset, scale, bias), (mean, r) = operands
        z = (_add(x, added, offset) - mean) * r
        g = dy if scale is None else dy * scale
        g_mean, gz_mean = (jnp.sum(a) * (1 / self.width) for a in (g, g * z))
        dz = r * (g - g_mean - z * gz_mean)
        sums = (
            None if offset is None else dz,
            None if scale is None else dy * z,
            None if bias is None else dy,
        )
        return Results((dz,), sums)


@dataclasses.dataclass(frozen=True)
class Silu(Operation):
    """Rows (x), vectors (bias)."""

    name = "silu"
    num_moments, num_gradients = 0, 1

    def forward(self, operands: Operands) -> Results:
        (x,), (bias,), _ = operands
        z = _add(x, bias)
        return Results((z * _sigmoid(z),))

    def backward(self, operands: Operands) -> Results:
        (x, dy), (bias,), _ = operands
        z = _add(x, bias)
        s = _sigmoid(z)
        dz = dy * (s * (1 + z * (1 - s)))
        return Results((dz,), (None if bias is None else dz,))


@dataclasses.dataclass(frozen=True)
class SiluGate(Operation):
    """Rows (x, y), vectors (bias)."""

    name = "silu_gate"
    num_moments, num_gradients = 0, 2

    def forward(self, operands: Operands) -> Results:
        (x, y), (bias,), _ = operands
        z = _add(x, bias)
        return Results((y * (z * _sigmoid(z)),))

    def backward(self, operands: Operands) -> Results:
        (x, y, d_out), (bias,), _ = operands
        z = _add(x, bias)
        s = _sigmoid(z)
        dz = d_out * y * (s * (1 + z * (1 - s)))
        return Results((dz, d_out * (z * s)), (None if bias is None else dz,))


def _add(row: Row, *others: Row | None) -> Row:
    for other in others:
        row = row if other is None else row + other
    return row


def _sigmoid(z: Row) -> Row:
    # One instruction and a product; a float32 division is ten.
    root = lax.rsqrt(1 + jnp.exp(-z))
    return root * root


class _Options(NamedTuple):
    operation: Operation
    dtype: Any
    forward: Shape
    backward: Shape
    interpret: Any


def apply(
    operation: Operation,
    rows: Rows,
    vectors: Vectors,
    *,
    dtype: Any,
    forward: Shape | None = None,
    backward: Shape | None = None,
) -> Float[Array, "*R W"]:
    """Runs an operation's kernels.

    Args:
      operation: which.
      rows: bfloat16, of one shape, as the operation lists them.
      vectors: any float type but float64.
      dtype: of the result.
      forward: how rows are shared out; a measured choice if None.
      backward: the same of the backward kernel.

    Raises:
      ValueError: a width or type that the kernels do not have, or a device that is no Hopper GPU.
    """
    check_hopper("mosaic_gpu")
    width = rows[0].shape[-1]
    reason = find_obstacle(operation, rows)
    if reason is not None:
        raise ValueError(f"{operation.name}: mosaic_gpu {reason}; use implementation 'xla' or None")
    if all(vector is None for vector in vectors) and not operation.num_moments:
        # Where rows begin and end does not matter then.
        width = _widest_tile(rows[0].size)
    flat = jax.tree.map(lambda row: row.reshape(-1, width), rows)
    wide = jax.tree.map(lambda vector: vector.astype(jnp.float32), vectors)
    options = _Options(
        operation,
        jnp.dtype(dtype),
        forward or choose_shape(operation, width, backward=False),
        backward or choose_shape(operation, width, backward=True),
        plgpu.InterpretGPUParams() if is_interpreted() else None,
    )
    return _apply(options, flat, wide).reshape(rows[0].shape)


def find_obstacle(operation: Operation, rows: Rows) -> str | None:
    """Why the kernels cannot take these rows; None if they can."""
    types = {row.dtype for row in rows if row is not None}
    if types != {jnp.dtype(jnp.bfloat16)}:
        return f"takes bfloat16 rows, these are {', '.join(sorted(map(str, types)))}"
    width = rows[0].shape[-1]
    if width % THREADS or not rows[0].size:
        return f"needs a width that is a multiple of {THREADS} and one row, got {rows[0].shape}"
    if operation.num_moments and width > WIDEST_NORM:
        return f"keeps rows of up to {WIDEST_NORM} numbers in registers, these have {width}"
    return None


def choose_shape(operation: Operation, width: int, *, backward: bool) -> Shape:
    """The choice of `block_sizes`."""
    if operation.num_moments:
        tile, by_width = width, NORMS[operation.name]
        choices = by_width[min(widest for widest in by_width if width <= widest)]
    else:
        tile, choices = _widest_tile(width), GATES
    at_once, blocks, keep_vectors, ahead = choices[backward]
    return Shape(tile, at_once, blocks * MULTIPROCESSORS, keep_vectors, ahead)


def _widest_tile(numbers: int) -> int:
    return max(tile for tile in GATE_TILES if numbers % tile == 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(options: _Options, rows: tuple, vectors: tuple) -> Array:
    return _forward(options, rows, vectors)[0]


def _forward(options: _Options, rows: tuple, vectors: tuple):
    operation = options.operation
    results = run(
        operation.forward,
        Operands(rows, vectors),
        Results((options.dtype,), moments=(jnp.float32,) * operation.num_moments),
        options.forward,
        name=f"rowwise_{operation.name}_forward",
        interpret=options.interpret,
    )
    return results.rows[0], (rows, vectors, results.moments)


def _backward(options: _Options, kept: tuple, cotangent: Array):
    rows, vectors, moments = kept
    operation = options.operation
    results = run(
        operation.backward,
        Operands((*rows, cotangent), vectors, moments),
        Results(
            (rows[0].dtype,) * operation.num_gradients,
            jax.tree.map(lambda vector: vector.dtype, vectors),
        ),
        options.backward,
        name=f"rowwise_{operation.name}_backward",
        interpret=options.interpret,
    )
    gradients = results.rows if operation.num_gradients > 1 else results.rows * len(rows)
    gradients = (None if row is None else g for row, g in zip(rows, gradients, strict=True))
    return tuple(gradients), jax.tree.map(lambda sums: sums.sum(axis=0), results.sums)


_apply.defvjp(_forward, _backward)
