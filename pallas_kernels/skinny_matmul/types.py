"""Operands and results of products of a few rows with a matrix.

B rows, K input and N output features; a matrix is stored as (N, K), each output feature's weights
side by side.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "swiglu"]


class Int8Matrix(NamedTuple):
    """A matrix of 8-bit integers with a scale for every output feature: W ≈ values * scale."""

    values: Int8[Array, "N K"]
    scale: Float32[Array, " N"]


Matrix = Float[Array, "N K"] | Int8Matrix


def values_of(matrix: Any) -> Any:
    """The matrix, or its integers."""
    return matrix.values if isinstance(matrix, Int8Matrix) else matrix


def sum_weights(matrix: Matrix) -> Float32[Array, " N"]:
    """Σ_k of the matrix's numbers, or of its integers without their scale, of a feature: (N,).

    LayerNorm on the sums needs them. Made once beside the matrix, they save every product the work.
    """
    values = values_of(matrix)
    return jnp.sum(values, axis=1, dtype=jnp.float32)


class RowNorm(NamedTuple):
    """A norm of every row before the product. Its scale and bias belong into the matrix and b.

    Attributes:
      kind: "rms" divides by the root of the mean square, "layer" subtracts the mean first.
      eps: added to the mean square or the variance.
    """

    kind: NormKind
    eps: float


class Epilogue(NamedTuple):
    """Operations after the product, in float32: scale * f(x Wᵀ + b) + Σ added.

    Attributes:
      bias: b; None: 0.
      activation: f: "silu"; "swiglu", silu of the first N/2 output features times the others; None.
      scale: of the output features; None: 1.
      added: arrays of the output's shape, float32 or the dtype of x.
    """

    bias: Float32[Array, " N"] | None = None
    activation: Activation | None = None
    scale: Float32[Array, " M"] | None = None
    added: Sequence[Float[Array, "B M"]] = ()


class Part(NamedTuple):
    """Adjacent output features that become an array of their own.

    Attributes:
      width: their number.
      dtype: of the array.
      is_swapped: instead of the next features, those of the part before once more, the two of every
        pair (2i, 2i + 1) exchanged: a rotary embedding then needs no permutation.
    """

    width: int
    dtype: Any
    is_swapped: bool = False


def starts_of(parts: Sequence[Part]) -> list[int]:
    """The first output feature of every part, and the number of all of them."""
    starts, end = [], 0
    for part in parts:
        if part.is_swapped:
            starts.append(starts[-1])
        else:
            starts.append(end)
            end += part.width
    return [*starts, end]


def check_parts(parts: Sequence[Part]) -> None:
    """Raises ValueError for a swapped part that does not follow one of its own width."""
    for before, part in zip([None, *parts], parts, strict=False):
        if part.is_swapped and (
            before is None or before.is_swapped or before.width != part.width or part.width % 2
        ):
            raise ValueError(
                f"part {part} is swapped: needs a part of the same even width before it, "
                f"which is {before}"
            )
