"""Operands of the kernels of products of a few rows."""

from typing import Any, NamedTuple

from pallas_kernels.skinny_matmul.types import Epilogue


class SkinnyOperands(NamedTuple):
    """Operands of the kernel: arrays, or references in the kernel.

    Attributes:
      x: (B, K).
      matrix: (N, K).
      epilogue: vectors (N,) and arrays (B, M).
    """

    x: Any
    matrix: Any
    epilogue: Epilogue
