"""How the Triton kernels divide a call: splits of a row, and groups of a program."""

from typing import NamedTuple

from pallas_kernels.common.target import find_target
from pallas_kernels.timestep_norm.row_splits.types import TILE, TimestepNormGeometry

# Features of a program of one warp: eight in each thread, which loads 16 bytes of bfloat16; four
# where too few programs would be left. (8, 2048, 1024) with gradients on an H200: 159 us with 256,
# 132 with 128, and more with 64.
PROGRAM_WIDTHS = (256, 128)
# A larger group would not stay in a warp's registers.
MAX_GROUP_FEATURES = 1024
# Programs of one warp per multiprocessor that the splits of all rows and groups should make.
PROGRAMS_PER_MULTIPROCESSOR = 16
# Tokens that are loaded together, while those before are worked on. With 8, the outputs' 128
# registers were 168; with 4, the gradients' 128 were 187.
MOMENTS_UNROLL, OUTPUTS_UNROLL, SLOPES_UNROLL, GRADIENTS_UNROLL = 8, 4, 4, 2

# Splits times groups of a program that merges what splits pass to each other.
STATE_BLOCK = 256


def choose_geometry(rows: int, length: int, groups: int, features: int) -> TimestepNormGeometry:
    """Sizes of a call on the target GPU, for a length that is a multiple of 128."""
    block = 1 << (features - 1).bit_length()
    tiles = length // TILE
    programs = PROGRAMS_PER_MULTIPROCESSOR * find_target().gpu_limits.multiprocessors
    for width in PROGRAM_WIDTHS:
        groups_per_block = next(
            n for n in (16, 8, 4, 2, 1) if groups % n == 0 and (n * block <= width or n == 1)
        )
        blocks = rows * groups // groups_per_block
        if blocks * tiles >= programs // 2:
            break
    splits = min(tiles, max(1, programs // blocks))
    tiles_per_split = -(-tiles // splits)
    # Memory has the group's own features: loads are masked.
    return TimestepNormGeometry(
        rows, tiles, tiles_per_split, groups, groups_per_block, features, features
    )


class StateBlock(NamedTuple):
    """A program that scans the splits of a row: splits, groups, warps; all powers of two."""

    splits: int
    groups: int
    warps: int


def choose_state_block(splits: int) -> StateBlock:
    """The program for a number of splits: at most two numbers in a thread for up to 1,024."""
    block = 1 << (splits - 1).bit_length()
    groups = max(1, min(8, STATE_BLOCK // block))
    return StateBlock(block, groups, max(1, min(16, block * groups // 64)))
