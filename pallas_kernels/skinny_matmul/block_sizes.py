"""How the Hopper kernel divides a matrix into blocks."""

from collections.abc import Sequence
from typing import NamedTuple

# Without tensor cores a warp has whole rows of the matrix: 32 threads with 8 adjacent weights each,
# 16 bytes of bfloat16.
WARPS, WIDTH = 4, 256
# Multiply-adds of 8 rows took 56 us for 32,000 x 1,024 on an H200, and 5 us for 1,024 x 2,048 (2.6
# for 2 rows).
MAX_MULTIPLY_ADD_ROWS = 4
# The first operand of the tensor cores' product has 16 rows.
MAX_ROWS = 16
# Weights that a block loads at once: 64 registers of every thread.
BYTES_IN_FLIGHT = 128 * 256
# Numbers of x that are loaded with the weights of a step: 64 registers.
MAX_LOADED_AHEAD = 8 * WIDTH


# Most output features of a block with tensor cores, columns of a warp, and of a tile.
TENSOR_CORE_FEATURES, WARP_WIDTH = 16, 32
TENSOR_CORE_WIDTH = WARPS * WARP_WIDTH
# Registers of a thread for the tiles of x that are loaded together.
ROW_REGISTERS = 64
# Fewer blocks do not read with all multiprocessors of a card, 132.
MIN_BLOCKS = 128
# Shared memory of a block for its weights.
MAX_WEIGHT_BYTES = 200 * 1024


class TensorCoreTiling(NamedTuple):
    """How the columns of a matrix are divided for tensor cores.

    Attributes:
      tiles: tiles of columns that are loaded together.
      features: output features of a block, 8 or 16.
    """

    tiles: int
    features: int


class SkinnyTiling(NamedTuple):
    """How a matrix is divided without tensor cores.

    Attributes:
      rows_per_warp: rows of the matrix, output features, of a warp.
      step: columns of the matrix, a multiple of WIDTH, that are loaded together.
    """

    rows_per_warp: int
    step: int

    @property
    def rows(self) -> int:
        """Rows of the matrix of a block."""
        return WARPS * self.rows_per_warp


def choose_tiling(out_features: int, in_features: int, *, is_paired: bool) -> SkinnyTiling:
    """The tiling of a matrix.

    Args:
      out_features: rows of the matrix; of each half for SwiGLU.
      in_features: its columns.
      is_paired: whether a block has rows of both halves.
    """
    rows_per_warp = 1 if is_paired or out_features % (2 * WARPS) else 2
    rows = WARPS * rows_per_warp * (2 if is_paired else 1)
    widths = in_features // WIDTH
    most = max(1, BYTES_IN_FLIGHT // (2 * WIDTH * rows))
    steps = -(-widths // most)
    return SkinnyTiling(rows_per_warp, WIDTH * -(-widths // steps))


def choose_tensor_core_tiling(
    rows: int,
    in_features: int,
    widths: Sequence[int],
    *,
    row_bytes: int,
    weight_bytes: int,
    is_paired: bool,
) -> TensorCoreTiling | None:
    """The tiling of a matrix for tensor cores; None if a block's weights do not fit.

    Args:
      rows: of x, 2, 4, 8 or 16.
      in_features: columns of the matrix.
      widths: output features of every part.
      row_bytes: bytes of a number of x.
      weight_bytes: bytes of a weight.
      is_paired: whether a block has rows of both halves.
    """
    halves = 2 if is_paired else 1
    registers = max(8, rows) * row_bytes * TENSOR_CORE_WIDTH // (4 * 32 * WARPS)
    # The sums of both halves take registers too.
    tiles = min(in_features // TENSOR_CORE_WIDTH, ROW_REGISTERS // halves // registers)
    for features in (TENSOR_CORE_FEATURES, TENSOR_CORE_FEATURES // 2):
        fits = features * halves * in_features * weight_bytes <= MAX_WEIGHT_BYTES
        is_last = features < TENSOR_CORE_FEATURES
        blocks = sum(widths) // features
        is_divisor = all(width % features == 0 for width in widths)
        if fits and is_divisor and (is_last or blocks >= MIN_BLOCKS):
            return TensorCoreTiling(tiles, features)
    return None
