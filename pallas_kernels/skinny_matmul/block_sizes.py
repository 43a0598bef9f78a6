"""How the Hopper kernel divides a matrix into blocks."""

from typing import NamedTuple

# A warp has whole rows of the matrix: 32 threads with 8 adjacent weights each, 16 bytes of
# bfloat16.
WARPS, WIDTH = 4, 256
# More rows cost more multiply-adds than the compiler's products on tensor cores take: of 8 rows,
# 32,000 x 1,024 took 56 us on an H200, 1,024 x 2,048 5 us (2.6 for 2 rows).
MAX_ROWS = 4
# Weights that a block loads at once: 64 registers of every thread.
BYTES_IN_FLIGHT = 128 * 256
# Numbers of x that are loaded with the weights of a step: 64 registers.
MAX_LOADED_AHEAD = 8 * WIDTH


class SkinnyTiling(NamedTuple):
    """How a matrix is divided.

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
