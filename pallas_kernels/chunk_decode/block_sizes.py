"""How chunk decoding is divided into blocks."""

from typing import Any, NamedTuple

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
# Blocks below which value columns are divided further, at the price of computing scores again, down
# to columns of FEWEST_BYTES, and from which on splits become longer, by bytes of a number. mega200M
# on an H200: 8 rows 22.8 us with 256 blocks, 20.0 with 512; 64 rows 90.6 with 1,024 blocks, 84.6
# with 512; 64 rows of 8-bit integers 50.4 and 58.0.
FEW_BLOCKS, MANY_BLOCKS = 384, {1: 8 * HOPPER.multiprocessors, 2: 6 * HOPPER.multiprocessors}
FEWEST_BYTES = 512
# Keys that are loaded early take registers, with which a multiprocessor has two blocks in place of
# three (three in place of four with 8-bit integers): up to this number of blocks.
FEW_RESIDENT = 2 * HOPPER.multiprocessors
MAX_SLOTS_PER_BLOCK = 256


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
      slots_per_block: slots of a split, a multiple of SCORE_SLOTS.
      value_tile: value columns of a block.
      slots_per_step: slots whose values are loaded together; divides slots_per_block.
      prefetch: whether a step loads the values of the next one.
      combine_tile: value columns of a block of the combining kernel.
      prefetch_keys: whether a block loads the keys of its first SCORE_SLOTS slots before it makes
        the query.
    """

    slots_per_block: int
    value_tile: int
    slots_per_step: int
    prefetch: bool
    combine_tile: int
    prefetch_keys: bool = False

    def count_splits(self, num_slots: int) -> int:
        """Splits of a chunk of `num_slots`; the last one may have fewer slots."""
        return pl.cdiv(num_slots, self.slots_per_block)


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
    slots = pl.cdiv(pl.cdiv(num_slots, MAX_SPLITS), SCORE_SLOTS) * SCORE_SLOTS
    tiles = [tile for tile in VALUE_TILES if value_width % tile == 0]
    # The widest tile where no tile is wide enough.
    tiles = [tile for tile in tiles if tile * itemsize >= FEWEST_BYTES] or tiles[:1]

    def count_blocks(tile: int) -> int:
        return num_heads * pl.cdiv(num_slots, slots) * (value_width // tile)

    value_tile = next((tile for tile in tiles if count_blocks(tile) >= FEW_BLOCKS), tiles[-1])
    # With long splits, more loads of a step take the place of values ahead: 8-bit integers, 64 rows
    # of mega200M on an H200, 63.2 us with values ahead and 50.4 without.
    prefetch, value_bytes = True, itemsize * value_tile
    most_slots = min(MAX_SLOTS_PER_BLOCK, num_slots)
    while count_blocks(value_tile) >= MANY_BLOCKS[itemsize] and 2 * slots <= most_slots:
        slots *= 2
        prefetch = False
    return DecodeTiling(
        slots_per_block=slots,
        value_tile=value_tile,
        slots_per_step=min(SCORE_SLOTS, (1 if prefetch else 2) * BYTES_PER_STEP // value_bytes),
        prefetch=prefetch,
        combine_tile=next(tile for tile in COMBINE_TILES if value_width % tile == 0),
        prefetch_keys=count_blocks(value_tile) <= FEW_RESIDENT,
    )
