"""How the Hopper kernels divide a call: splits of a row, and groups of a block."""

from pallas_kernels.common.devices import HOPPER
from pallas_kernels.timestep_norm.row_splits.types import TILE, TimestepNormGeometry

# More features of a group do not fit into registers.
MAX_GROUP_FEATURES = 64
# wgmma's layout holds features by 8; without bank conflicts by 16.
FEATURE_MULTIPLE = 16
# Warpgroups that the splits of all rows and groups should make: two on each multiprocessor.
TARGET_WARPGROUPS = 2 * HOPPER.multiprocessors
# Tiles of a split at least.
MIN_SPLIT_TILES = 4
# Bytes of shared memory of the gradients at the largest block; more than an RTX card has.
SHARED_MEMORY = 118 * 1024


def choose_geometry(
    rows: int,
    length: int,
    groups: int,
    features: int,
    *,
    split: int | None,
    groups_per_block: int | None,
) -> TimestepNormGeometry:
    """Sizes of a call; README.md has the measurements.

    Args:
      rows: rows B.
      length: tokens of a row, a multiple of 128.
      groups: groups G.
      features: features of a group.
      split: tokens of a split, a multiple of 128; None for splits that fill the GPU once.
      groups_per_block: a divisor of `groups`; None for a measured choice.
    """
    width = features + -features % FEATURE_MULTIPLE
    tiles = length // TILE
    if groups_per_block is None:
        groups_per_block = _choose_groups_per_block(rows, groups, width)
    blocks = rows * groups // groups_per_block
    if split is None:
        splits = max(1, TARGET_WARPGROUPS // blocks)
        tiles_per_split = max(-(-tiles // min(splits, tiles)), min(MIN_SPLIT_TILES, tiles))
    else:
        tiles_per_split = min(split // TILE, tiles)
    return TimestepNormGeometry(
        rows, tiles, tiles_per_split, groups, groups_per_block, features, width
    )


def _choose_groups_per_block(rows: int, groups: int, width: int) -> int:
    """As many groups as fill cache lines, or fewer if rows then need no splits."""
    choices = [n for n in (4, 2, 1) if n * width <= MAX_GROUP_FEATURES and groups % n == 0]
    unsplit = (n for n in choices if 4 * rows * (groups // n) >= 3 * TARGET_WARPGROUPS)
    return next(unsplit, choices[0])
