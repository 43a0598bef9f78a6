"""How the Hopper kernel divides rows and channels into blocks."""

from typing import NamedTuple

from jax.experimental import pallas as pl

# Threads of a warpgroup, the threads of a block; channels are cut into multiples of it.
THREADS = 128


class StepTiling(NamedTuple):
    """How a step is divided into blocks.

    Attributes:
      tile: channels of a block.
      rows_per_block: rows of a block, which loads the tables once; the last one may have fewer.
    """

    tile: int
    rows_per_block: int

    @property
    def vec_size(self) -> int:
        """Adjacent channels of a thread: 4 of float32 are 16 bytes, the widest load."""
        return next(size for size in (4, 2, 1) if self.tile % (size * THREADS) == 0)


def choose_tiling(num_rows: int) -> StepTiling:
    """Blocks of one row until there are many: a row of 1,024 channels makes 8 of them."""
    # Tables are 5/4 of the bytes that a row's state moves. They come from the L2 cache, which
    # becomes the limit if every one of many rows reads them.
    return StepTiling(tile=THREADS, rows_per_block=max(1, min(4, num_rows // 32)))


def count_blocks(num_rows: int, channels: int, tiling: StepTiling) -> dict[str, int]:
    """Sizes of the grid's axes, groups of rows r and tiles of channels c."""
    return {"r": pl.cdiv(num_rows, tiling.rows_per_block), "c": channels // tiling.tile}
