"""Products of a few rows with a matrix: norm before it, bias, activation and residuals after it."""

from pallas_kernels.skinny_matmul.api import skinny_matmul
from pallas_kernels.skinny_matmul.types import Epilogue, Int8Matrix, Part, RowNorm, sum_weights

__all__ = ["Epilogue", "Int8Matrix", "Part", "RowNorm", "skinny_matmul", "sum_weights"]
