"""Split sizes of CEMA's Hopper kernels, from measurements (README.md has the tables)."""

from pallas_kernels.cema.row_splits.types import CHANNELS, TILE
from pallas_kernels.common.devices import HOPPER

# Warpgroups that all splits of all rows and channels should make: two per multiprocessor, which
# fit into its registers. More of them would run in a second wave and pass more states.
WARPGROUPS = 2 * HOPPER.multiprocessors
# Least number of tokens in a split: a kernel takes some microseconds to start and to end.
SHORTEST_SPLIT = 128


def choose_split_size(rows: int, length: int, width: int) -> int:
    """Tokens of a split such that the splits of (rows, length, width) fill the GPU once."""
    tiles = -(-length // TILE)
    wanted = max(1, WARPGROUPS // (rows * (width // CHANNELS)))
    shortest = SHORTEST_SPLIT // TILE
    return max(-(-tiles // min(wanted, tiles)), min(shortest, tiles)) * TILE
