"""How the Hopper kernels divide rows into blocks, from one sweep on an H200 (README.md).

Blocks should all run at once, which their registers decide, or be many more than can: a second,
partly filled wave of blocks doubled the time of a gate.
"""

from typing import NamedTuple

from jax.experimental import pallas as pl

from pallas_kernels.common.devices import HOPPER
from pallas_kernels.rowwise.types import RowwiseOperation

# Threads of a warpgroup, the threads of a block.
THREADS = 128
# Numbers in all rows from which on kernels are the default: smaller operations take less time than
# a launch, and XLA fuses them with their surroundings.
SMALLEST_SIZE = 2**20
# Kernels are the default for multiples of this width: all loads are 16 bytes wide. Other widths run
# if asked for by name.
DEFAULT_WIDTH = 1024


class RowTiling(NamedTuple):
    """How rows are divided into blocks.

    Attributes:
      tile: columns of a block.
      rows_per_step: rows that are loaded in one step.
      max_blocks: upper bound on the number of blocks.
      vectors_in_registers: whether vectors stay in registers; else every row loads them from the
        cache.
      prefetch: whether a step loads the rows of the next one.
    """

    tile: int
    rows_per_step: int
    max_blocks: int
    vectors_in_registers: bool = True
    prefetch: bool = True

    @property
    def vec_size(self) -> int:
        """Adjacent columns of a thread: 8 of bfloat16 are 16 bytes, the widest load."""
        return next(size for size in (8, 4, 2, 1) if self.tile % (size * THREADS) == 0)

    def rows_per_block(self, num_rows: int, width: int) -> int:
        """Rows of every block but the last, which may have fewer."""
        blocks = max(1, self.max_blocks * self.tile // width)
        return pl.cdiv(num_rows, blocks * self.rows_per_step) * self.rows_per_step


class RowBlocks(NamedTuple):
    """An entry of the tables: `RowTiling` for one multiprocessor."""

    rows_per_step: int
    blocks_per_multiprocessor: int
    vectors_in_registers: bool = True
    prefetch: bool = True


# Forward and backward, by the largest width. RMSNorm above 1,024 and LayerNorm at 2,048 were not
# measured: they are what fits into registers, by analogy.
NORM_BLOCKS: dict[str, dict[int, tuple[RowBlocks, RowBlocks]]] = {
    "rms_norm": {
        1024: (RowBlocks(2, 8), RowBlocks(2, 4)),
        2048: (RowBlocks(1, 6), RowBlocks(1, 3)),
        4096: (RowBlocks(1, 4), RowBlocks(1, 2, vectors_in_registers=False)),
    },
    "layer_norm": {
        1024: (RowBlocks(2, 4), RowBlocks(2, 3)),
        2048: (RowBlocks(1, 4), RowBlocks(1, 3, vectors_in_registers=False, prefetch=False)),
        4096: (
            RowBlocks(1, 3, vectors_in_registers=False),
            RowBlocks(1, 2, vectors_in_registers=False, prefetch=False),
        ),
    },
}
# A norm's row stays in registers.
MAX_NORM_WIDTH = 4096
# A gate's row is cut into tiles, the widest that divides it. Forward and backward.
GATE_TILES = (1024, 512, 256, 128)
GATE_BLOCKS = RowBlocks(1, 32, vectors_in_registers=False, prefetch=False), RowBlocks(2, 4)


def choose_tiling(operation: RowwiseOperation, width: int, *, backward: bool) -> RowTiling:
    """The tiling of the tables for rows of `width` numbers."""
    if operation in NORM_BLOCKS:
        tile, by_width = width, NORM_BLOCKS[operation]
        blocks = by_width[min(largest for largest in by_width if width <= largest)]
    else:
        tile, blocks = widest_gate_tile(width), GATE_BLOCKS
    rows_per_step, per_multiprocessor, vectors_in_registers, prefetch = blocks[backward]
    max_blocks = per_multiprocessor * HOPPER.multiprocessors
    return RowTiling(tile, rows_per_step, max_blocks, vectors_in_registers, prefetch)


def widest_gate_tile(width: int) -> int:
    """The widest tile of a gate that divides `width`."""
    return max(tile for tile in GATE_TILES if width % tile == 0)
