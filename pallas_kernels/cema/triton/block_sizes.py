"""Split sizes of CEMA's Triton kernels."""

from pallas_kernels.cema.row_splits.types import CHANNELS, TILE
from pallas_kernels.common.target import find_target

# Blocks of 128 threads per multiprocessor that all splits of all rows and channels should make: the
# backward kernel's registers admit two. A second wave of blocks would be partly filled.
BLOCKS_PER_MULTIPROCESSOR = 2
# Least number of tokens in a split: a kernel takes some microseconds to start and to end.
SHORTEST_SPLIT = 128
# Tokens that are loaded together: more hide more latency, in more instructions.
FORWARD_UNROLL = 8
BACKWARD_UNROLL = 4


def choose_split_size(rows: int, length: int, width: int) -> int:
    """Tokens of a split such that the splits of (rows, length, width) fill the target GPU."""
    blocks = BLOCKS_PER_MULTIPROCESSOR * find_target().gpu_limits.multiprocessors
    tiles = -(-length // TILE)
    wanted = max(1, blocks // (rows * (width // CHANNELS)))
    shortest = SHORTEST_SPLIT // TILE
    return max(-(-tiles // min(wanted, tiles)), min(shortest, tiles)) * TILE
