"""One row of every operation, forward and backward, in registers.

A norm's backward function gets the moments of its row from the forward one. With
xh = (z - mean) r, r = 1 / sqrt(var + eps), g = dy scale and means over a row,

    dz = r (g - mean(g) - xh mean(g xh))        dscale = Σ dy xh    dbias = Σ dy    doffset = Σ dz

where Σ is over rows; without mean(g) for RMSNorm. With s = sigmoid(z) of a gate,
d silu(z) / dz = s (1 + z (1 - s)).
"""

import abc
import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from pallas_kernels.rowwise.mosaic_gpu.pipeline import Row, RowOperands, RowResults
from pallas_kernels.rowwise.types import RowwiseOperation


class RowKernel(abc.ABC):
    """The functions of one row of an operation."""

    name: ClassVar[RowwiseOperation]
    num_moments: ClassVar[int]
    """Numbers of a row that `backward` needs."""
    num_gradients: ClassVar[int]
    """Different gradients of rows: terms of one sum share theirs."""

    @abc.abstractmethod
    def forward(self, operands: RowOperands) -> RowResults:
        """One row of the result, and its moments."""

    @abc.abstractmethod
    def backward(self, operands: RowOperands) -> RowResults:
        """Gradients of rows, and of vectors as sums; the last of the rows is the cotangent."""


@dataclasses.dataclass(frozen=True)
class RmsNorm(RowKernel):
    """Rows (x), vectors (scale), moments (r)."""

    name = "rms_norm"
    num_moments, num_gradients = 1, 1

    width: int
    eps: float

    def forward(self, operands: RowOperands) -> RowResults:
        (x,), (scale,), _ = operands
        r = lax.rsqrt(jnp.sum(x * x) * (1 / self.width) + self.eps)
        y = x * r
        return RowResults((y if scale is None else y * scale,), moments=(r,))

    def backward(self, operands: RowOperands) -> RowResults:
        (x, dy), (scale,), (r,) = operands
        x = x * r
        g = dy if scale is None else dy * scale
        dx = r * (g - x * (jnp.sum(g * x) * (1 / self.width)))
        return RowResults((dx,), (None if scale is None else dy * x,))


@dataclasses.dataclass(frozen=True)
class LayerNorm(RowKernel):
    """Rows (x, added), vectors (offset, scale, bias), moments (mean, r)."""

    name = "layer_norm"
    num_moments, num_gradients = 2, 1

    width: int
    eps: float

    def forward(self, operands: RowOperands) -> RowResults:
        (x, added), (offset, scale, bias), _ = operands
        z = _add(x, added, offset)
        mean = jnp.sum(z) * (1 / self.width)
        z = z - mean
        r = lax.rsqrt(jnp.sum(z * z) * (1 / self.width) + self.eps)
        y = z * r
        y = y if scale is None else y * scale
        return RowResults((_add(y, bias),), moments=(mean, r))

    def backward(self, operands: RowOperands) -> RowResults:
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
        return RowResults((dz,), sums)


@dataclasses.dataclass(frozen=True)
class Silu(RowKernel):
    """Rows (x), vectors (bias)."""

    name = "silu"
    num_moments, num_gradients = 0, 1

    def forward(self, operands: RowOperands) -> RowResults:
        (x,), (bias,), _ = operands
        z = _add(x, bias)
        return RowResults((z * _sigmoid(z),))

    def backward(self, operands: RowOperands) -> RowResults:
        (x, dy), (bias,), _ = operands
        z = _add(x, bias)
        s = _sigmoid(z)
        dz = dy * (s * (1 + z * (1 - s)))
        return RowResults((dz,), (None if bias is None else dz,))


@dataclasses.dataclass(frozen=True)
class SiluGate(RowKernel):
    """Rows (x, y), vectors (bias)."""

    name = "silu_gate"
    num_moments, num_gradients = 0, 2

    def forward(self, operands: RowOperands) -> RowResults:
        (x, y), (bias,), _ = operands
        z = _add(x, bias)
        return RowResults((y * (z * _sigmoid(z)),))

    def backward(self, operands: RowOperands) -> RowResults:
        (x, y, d_out), (bias,), _ = operands
        z = _add(x, bias)
        s = _sigmoid(z)
        dz = d_out * y * (s * (1 + z * (1 - s)))
        return RowResults((dz, d_out * (z * s)), (None if bias is None else dz,))


def _add(row: Row, *others: Row | None) -> Row:
    for other in others:
        row = row if other is None else row + other
    return row


def _sigmoid(z: Row) -> Row:
    # One rsqrt instruction and a product; a float32 division takes ten instructions.
    root = lax.rsqrt(1 + jnp.exp(-z))
    return root * root
