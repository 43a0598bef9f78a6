"""How the Triton kernels divide a call: splits of a row, and groups of a program."""

from pallas_kernels.common.target import find_target
from pallas_kernels.timestep_norm.row_splits.types import TILE, TimestepNormGeometry

# Features of a program of one warp: eight in each thread, which loads 16 bytes of bfloat16.
PROGRAM_WIDTH = 256
# A larger group would not stay in a warp's registers.
MAX_GROUP_FEATURES = 1024
# Programs of one warp per multiprocessor that the splits of all rows and groups should make.
PROGRAMS_PER_MULTIPROCESSOR = 16
# Tokens that are loaded together. With 8, the outputs' 128 registers were 168.
MOMENTS_UNROLL, OUTPUTS_UNROLL, BACKWARD_UNROLL = 8, 4, 4


def choose_geometry(rows: int, length: int, groups: int, features: int) -> TimestepNormGeometry:
    """Sizes of a call on the target GPU, for a length that is a multiple of 128."""
    width = 1 << (features - 1).bit_length()
    groups_per_block = next(
        n for n in (16, 8, 4, 2, 1) if groups % n == 0 and (n * width <= PROGRAM_WIDTH or n == 1)
    )
    tiles = length // TILE
    blocks = rows * groups // groups_per_block
    programs = PROGRAMS_PER_MULTIPROCESSOR * find_target().gpu_limits.multiprocessors
    splits = min(tiles, max(1, programs // blocks))
    tiles_per_split = -(-tiles // splits)
    # Memory has the group's own features: loads are masked.
    return TimestepNormGeometry(
        rows, tiles, tiles_per_split, groups, groups_per_block, features, features
    )
