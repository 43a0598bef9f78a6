"""How the Hopper kernel divides a matrix into blocks."""

from typing import NamedTuple

# A warp has whole rows of the matrix: 32 threads with 8 adjacent weights each, 16 bytes of
# bfloat16.
WARPS, WIDTH = 4, 256
# More rows of x would not leave their sums in registers.
MAX_ROWS = 8
# Weights that a block loads at once: 64 registers of every thread.
BYTES_IN_FLIGHT = 128 * 256
# Rows of x that are normalized in shared memory.
MAX_NORMALIZED_BYTES = 128 * 1024


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
