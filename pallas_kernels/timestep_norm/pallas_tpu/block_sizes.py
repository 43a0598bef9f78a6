"""Block sizes of TimestepNorm on TPU. README.md has the compiler's estimates behind them."""

from typing import NamedTuple

from pallas_kernels.common.devices import DEFAULT_VMEM

# Lanes of a vector register; also the channels and tokens that are transposed at once.
LANES = 128
# Sublanes of a vector register: statistics of so many groups share a register.
SUBLANES = 8
_MAX_CHANNELS = 1024
_MAX_TOKENS = 2048
# Generations on which the compiler's estimate is below that of `xla`.
TPUS_FASTER_THAN_XLA = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite")
# Shorter rows fill less than one tile of tokens.
SHORTEST_LENGTH = 128


class TimestepNormTpuBlocks(NamedTuple):
    """Sizes of the tile that one grid step works on.

    Attributes:
      tokens: tokens of a tile, a multiple of 128.
      groups: groups of a tile; all of them are whole, with a multiple of 128 channels together.
      features: features of a group with padding: 8, 16, 32, 64 or a multiple of 128.
      padded_groups: groups of x, padded to a multiple of `groups`.
    """

    tokens: int
    groups: int
    features: int
    padded_groups: int

    @property
    def channels(self) -> int:
        """Channels of a tile."""
        return self.groups * self.features


def choose_blocks(
    length: int, num_groups: int, features: int, bytes_per_number: int
) -> TimestepNormTpuBlocks | None:
    """The block sizes of a call; None if 128 tokens of one group do not fit into VMEM.

    Args:
      length: tokens of a row.
      num_groups: groups of a token.
      features: features of a group.
      bytes_per_number: bytes of a number of x.
    """
    padded = _pad_features(features)
    min_groups = max(1, LANES // padded)
    padded_groups = -(-num_groups // min_groups) * min_groups
    max_groups = max(min_groups, min(SUBLANES, _MAX_CHANNELS // padded))
    groups = max(n for n in range(min_groups, max_groups + 1, min_groups) if padded_groups % n == 0)
    tokens = min(_MAX_TOKENS, -(-length // LANES) * LANES)
    while _vmem_bytes(tokens, groups, padded, bytes_per_number) > DEFAULT_VMEM:
        if tokens == LANES:
            return None
        tokens = max(LANES, tokens // 2 // LANES * LANES)
    return TimestepNormTpuBlocks(tokens, groups, padded, padded_groups)


def _pad_features(features: int) -> int:
    if features > LANES // 2:
        return -(-features // LANES) * LANES
    return max(8, 1 << (features - 1).bit_length())


def _vmem_bytes(tokens: int, groups: int, features: int, bytes_per_number: int) -> int:
    """VMEM of the backward kernel, the larger one.

    It holds x, dy and dx in two buffers each, x and dy transposed in float32, and group statistics.
    """
    channels, group_rows = groups * features, -(-groups // SUBLANES) * SUBLANES
    tiles = tokens * channels * (6 * bytes_per_number + 2 * 4)
    return tiles + 24 * group_rows * tokens * 4 + 3 * channels * LANES * 4
