"""How chunk decoding is divided into blocks."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.devices import HOPPER

# Queries are padded to this many rows in `xla`: with fewer, a product uses neither the tensor cores
# of a GPU nor the matrix unit of a TPU.
PADDED_QUERIES = 16
# Slots of one step of the loop that `xla` makes on a CPU.
CPU_SLOTS = 128

# Threads of a warpgroup, the threads of a block; a block's value columns are a multiple of it.
THREADS = 128
# Slots whose scores a warpgroup computes at once, and bytes of their keys of one such step.
SCORE_SLOTS, KEY_BYTES = 64, 64
# Widths of keys are a multiple of this, 128 bytes, and at most what registers can hold.
KEY_MULTIPLE, MAX_KEY_WIDTH = 64, 512
# Bytes of values that a block loads in one step, 128 for every thread.
BYTES_PER_STEP = 128 * THREADS
# Widest first: value columns of a block, and of a block of the kernel that combines splits.
VALUE_TILES = (2048, 1024, 512, 256, 128)
COMBINE_TILES = (256, 128)
# The combining kernel loads all splits of a row at once.
MAX_SPLITS = 32
# Blocks that a multiprocessor has at once, by bytes of a number: registers allow at least these
# where keys are not loaded early (tests/kernels/chunk_decode/test_mosaic_gpu_aot.py).
RESIDENT_BLOCKS = {1: 4, 2: 3}
# Blocks below which value columns are divided further, at the price of computing scores again, down
# to columns of FEWEST_BYTES. mega200M on an H200, 8 rows: 22.8 us with 256 blocks, 20.0 with 512.
FEW_BLOCKS, FEWEST_BYTES = 384, 512
# Keys that are loaded early take registers, with which a multiprocessor has two blocks in place of
# three (three in place of four with 8-bit integers): up to this number of blocks.
FEW_RESIDENT = 2 * HOPPER.multiprocessors
# Slots of the longest split, unless a chunk would have more than MAX_SPLITS. A chosen length is a
# multiple of SLOTS_UNIT.
MAX_SLOTS_PER_BLOCK, SLOTS_UNIT = 256, 16


# Slots of a block of the TPU kernel, the most first. With fewer bytes a step would be shorter than
# what a step costs by itself; with more, blocks of empty slots are read.
TPU_SLOTS, TPU_BLOCK_BYTES = (512, 256, 128), 3 * 2**19
# Slots that it writes for a token: a tile of 8-bit integers.
SLOTS_PER_WRITE = 32
# Where the compiler's estimate is below that of `xla`.
TPUS_FASTER_THAN_XLA = ("TPU v5 lite", "TPU v5", "TPU v6 lite")


def choose_tpu_block(key: Any, value: Any) -> int | None:
    """Slots of a block of the TPU kernel; None if the smallest block is too large.

    Args:
      key: keys of the cache, or their shape: (S, H, C, Dk) and a dtype.
      value: values of the cache, or their shape.
    """
    num_slots = key.shape[2]
    slot_bytes = sum(slots.shape[3] * slots.dtype.itemsize for slots in (key, value))
    size = next((size for size in TPU_SLOTS if size * slot_bytes <= TPU_BLOCK_BYTES), None)
    # A block of the whole chunk may have any number of slots.
    return size if size is None else min(size, num_slots)


class DecodeTiling(NamedTuple):
    """How the slots and the value columns of a row's head are divided into blocks.

    Attributes:
      slots_per_block: slots of a split, a multiple of SCORE_SLOTS; the most slots with
        `target_splits`.
      value_tile: value columns of a block.
      slots_per_step: slots whose values are loaded together; divides slots_per_block.
      prefetch: whether a step loads the values of the next one.
      combine_tile: value columns of a block of the combining kernel.
      prefetch_keys: whether a block loads the keys of its first SCORE_SLOTS slots before it makes
        the query.
      target_splits: splits that share the filled slots of a row equally, where these are neither
        too few nor too many (`split_size`); None: splits of slots_per_block slots.
    """

    slots_per_block: int
    value_tile: int
    slots_per_step: int
    prefetch: bool
    combine_tile: int
    prefetch_keys: bool = False
    target_splits: int | None = None

    def split_size(self, num_filled: Any, num_slots: int) -> Any:
        """Slots of a split of a row; the last one may have fewer.

        It follows from the row alone: the order of its sums does not depend on its neighbours.

        Args:
          num_filled: filled slots of the row, 1 to `num_slots`: an integer or an int32 array.
          num_slots: slots C of a chunk.
        """
        if self.target_splits is None:
            return self.slots_per_block
        fewest = pl.cdiv(num_filled, self.slots_per_block)
        most = pl.cdiv(num_filled, shortest_split(num_slots))
        splits = jnp.minimum(most, jnp.maximum(fewest, self.target_splits))
        return pl.cdiv(pl.cdiv(num_filled, splits), SLOTS_UNIT) * SLOTS_UNIT

    def count_splits(self, num_slots: int) -> int:
        """The most splits that a chunk of `num_slots` may have."""
        fewest = pl.cdiv(num_slots, self.slots_per_block)
        if self.target_splits is None:
            return fewest
        return min(pl.cdiv(num_slots, shortest_split(num_slots)), max(fewest, self.target_splits))


def shortest_split(num_slots: int) -> int:
    """Slots of the shortest splits: a chunk of `num_slots` has at most MAX_SPLITS."""
    return pl.cdiv(num_slots, MAX_SPLITS * SCORE_SLOTS) * SCORE_SLOTS


def choose_tiling(
    num_heads: int, num_slots: int, value_width: int, itemsize: int = 2
) -> DecodeTiling:
    """The tiling for `num_heads` heads of all rows together, each with `num_slots` slots.

    Args:
      num_heads: heads of all rows.
      num_slots: slots C of a chunk.
      value_width: Dv.
      itemsize: bytes of a number in the cache.
    """
    slots = shortest_split(num_slots)
    tiles = [tile for tile in VALUE_TILES if value_width % tile == 0]
    # The widest tile where no tile is wide enough.
    tiles = [tile for tile in tiles if tile * itemsize >= FEWEST_BYTES] or tiles[:1]

    def count_blocks(tile: int) -> int:
        return num_heads * pl.cdiv(num_slots, slots) * (value_width // tile)

    value_tile = next((tile for tile in tiles if count_blocks(tile) >= FEW_BLOCKS), tiles[-1])
    num_blocks = count_blocks(value_tile)
    resident = RESIDENT_BLOCKS[itemsize] * HOPPER.multiprocessors
    target_splits = None
    if num_blocks > resident:
        # A multiple of SCORE_SLOTS: a split's keys are loaded in as many at once.
        longest = min(MAX_SLOTS_PER_BLOCK, num_slots) // SCORE_SLOTS * SCORE_SLOTS
        slots = max(slots, longest)
        target_splits = resident // (num_heads * (value_width // value_tile))
    # With many blocks, more loads of a step take the place of values ahead. In long splits of 8-bit
    # integers values ahead take registers, with which a multiprocessor has three blocks in place of
    # four: 64 rows of mega200M on an H200, splits of 128 slots, 63.2 us with them, 50.4 without.
    prefetch = num_blocks <= resident or (itemsize > 1 and num_blocks < 2 * resident)
    return DecodeTiling(
        slots_per_block=slots,
        value_tile=value_tile,
        slots_per_step=values_per_step(value_tile, itemsize, prefetch=prefetch),
        prefetch=prefetch,
        combine_tile=next(tile for tile in COMBINE_TILES if value_width % tile == 0),
        prefetch_keys=num_blocks <= FEW_RESIDENT,
        target_splits=target_splits,
    )


def values_per_step(value_tile: int, itemsize: int, *, prefetch: bool) -> int:
    """Slots of a step: twice the bytes where the values of the next one are not on their way.

    Args:
      value_tile: value columns of a block.
      itemsize: bytes of a number in the cache.
      prefetch: whether a step loads the values of the next one.
    """
    num_bytes = (1 if prefetch else 2) * BYTES_PER_STEP
    return min(SCORE_SLOTS, num_bytes // (itemsize * value_tile))
