"""Operands of the kernels of products of a few rows, and the operations after a product."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.skinny_matmul.types import Epilogue, Int8Matrix, RowNorm, values_of


class SkinnyOperands(NamedTuple):
    """Operands of the kernel: arrays, or references in the kernel.

    Attributes:
      x: (B, K).
      matrix: (N, K).
      epilogue: vectors (N,) and arrays (B, M).
      weight_sums: (N,), Σ_k of the matrix's values; None: the kernel adds them up.
    """

    x: Any
    matrix: Any
    epilogue: Epilogue
    weight_sums: Any = None

    @property
    def values(self) -> Any:
        """The matrix, or its integers."""
        return values_of(self.matrix)

    @property
    def halves(self) -> int:
        """2 for SwiGLU, whose output features have a row in each half of the matrix."""
        return 2 if self.epilogue.activation == "swiglu" else 1

    def half_start(self, half: int) -> int:
        """The first row of a half of the matrix."""
        return half * (self.values.shape[0] // 2)

    def apply_norm(
        self,
        norm: RowNorm,
        by_half: Sequence[Any],
        *,
        mean: Any,
        mean_square: Any,
        weight_sums: Sequence[Any],
        across: Callable[[Any], Any] = lambda of_rows: of_rows,
    ) -> list[Any]:
        """y of every half for the normalized rows: r (y - μ Σ_k W_k), r = rsqrt(variance + eps).

        Args:
          norm: of the rows.
          by_half: y of every half, products with the rows as they are.
          mean: μ, which only LayerNorm needs.
          mean_square: of the rows.
          weight_sums: Σ_k W_k of every half, for LayerNorm.
          across: gives a number of every row the shape of y.
        """
        if norm.kind == "layer":
            mean_square = jnp.maximum(mean_square - mean * mean, 0.0)
            by_half = [
                y - across(mean) * sums for y, sums in zip(by_half, weight_sums, strict=True)
            ]
        factor = across(lax.rsqrt(mean_square + norm.eps))
        return [y * factor for y in by_half]

    def apply_epilogue(
        self, by_half: Sequence[Any], vector: Callable[..., Any], added: Callable[[Any], Any]
    ) -> Any:
        """scale * f(y + b) + Σ added, in float32.

        Args:
          by_half: y of every half, after the norm.
          vector: loads the block's part of a vector from a reference, after an offset.
          added: loads the block's part of an array (B, M).
        """
        epilogue, matrix = self.epilogue, self.matrix
        halves = []
        for half, y in enumerate(by_half):
            if isinstance(matrix, Int8Matrix):
                y = y * vector(matrix.scale, self.half_start(half))
            if epilogue.bias is not None:
                y = y + vector(epilogue.bias, self.half_start(half))
            halves.append(y)
        y = halves[0]
        if epilogue.activation is not None:
            y = y / (1 + jnp.exp(-y))
        if epilogue.activation == "swiglu":
            y = y * halves[1]
        if epilogue.scale is not None:
            y = y * vector(epilogue.scale)
        for each in epilogue.added:
            y = y + added(each)
        return y
