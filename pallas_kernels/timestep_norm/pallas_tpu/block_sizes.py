"""Blocks of TimestepNorm on TPU. README.md has the compiler's estimates behind them."""

from typing import NamedTuple

_MIB = 2**20
LANES = 128
# What every generation gives a kernel without being asked.
VMEM_LIMIT = 16 * _MIB
# Group statistics fill registers of 8 rows.
_GROUPS = 8
_MOST_CHANNELS = 1024
_MOST_TOKENS = 2048
# Where the compiler's estimate is below that of `xla`.
TPUS_FASTER_THAN_XLA = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite")
# Shorter rows fill less than one tile of tokens.
SHORTEST_LENGTH = 128


class TpuBlocks(NamedTuple):
    """What one grid step works on.

    Attributes:
      tokens: a multiple of 128.
      groups: whole groups, whose channels are a multiple of 128.
      features: of a group, padded: 8, 16, 32, 64 or a multiple of 128.
      padded_groups: all groups of x, padded to a multiple of `groups`.
    """

    tokens: int
    groups: int
    features: int
    padded_groups: int

    @property
    def channels(self) -> int:
        """Channels of one grid step."""
        return self.groups * self.features


def choose_blocks(
    length: int, num_groups: int, features: int, bytes_per_number: int
) -> TpuBlocks | None:
    """The blocks of a call; None if a group is too wide for the memory of a core.

    Args:
      length: tokens of a row.
      num_groups: groups of a token.
      features: of a group.
      bytes_per_number: of x.
    """
    padded = _pad_features(features)
    least = max(1, LANES // padded)
    padded_groups = -(-num_groups // least) * least
    most = max(least, min(_GROUPS, _MOST_CHANNELS // padded))
    groups = max(n for n in range(least, most + 1, least) if padded_groups % n == 0)
    tokens = min(_MOST_TOKENS, -(-length // LANES) * LANES)
    while _vmem_bytes(tokens, groups, padded, bytes_per_number) > VMEM_LIMIT:
        if tokens == LANES:
            return None
        tokens = max(LANES, tokens // 2 // LANES * LANES)
    return TpuBlocks(tokens, groups, padded, padded_groups)


def _pad_features(features: int) -> int:
    if features > LANES // 2:
        return -(-features // LANES) * LANES
    return max(8, 1 << (features - 1).bit_length())


def _vmem_bytes(tokens: int, groups: int, features: int, bytes_per_number: int) -> int:
    """Of the backward kernel: x, dy, dx in two buffers, x and dy turned, and group statistics."""
    channels, rows = groups * features, -(-groups // 8) * 8
    tiles = tokens * channels * (6 * bytes_per_number + 2 * 4)
    return tiles + 24 * rows * tokens * 4 + 3 * channels * LANES * 4
