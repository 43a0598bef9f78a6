"""Tiles of CEMA's TPU kernels by generation. README.md has the compiler's estimates behind them."""

from typing import NamedTuple

_MIB = 2**20
# The kernels read whole registers of 8 rows, and a row is a block of 128 tokens.
SMALLEST_TILE = 1024


class TpuTile(NamedTuple):
    """How one TPU generation runs the kernels.

    Attributes:
      tokens: of one grid step, (forward, backward), for bfloat16 and N up to 16; multiples of
        1,024, the second divides the first.
      unroll: groups of 4 channels in flight at once, (forward, backward).
      vmem_limit: bytes that a kernel may use.
      largest_order: the largest N whose tables fit.
    """

    tokens: tuple[int, int]
    unroll: tuple[int, int]
    vmem_limit: int
    largest_order: int = 32

    def tokens_for(self, *, float32: bool, large_order: bool) -> tuple[int, int]:
        """`tokens` that fit for other inputs: half of it for float32, half for N above 16."""
        share = (2 if float32 else 1) * (2 if large_order else 1)
        forward, backward = (max(SMALLEST_TILE, tokens // share) for tokens in self.tokens)
        return forward, backward


# By `device_kind`.
TILES = {
    "TPU v4": TpuTile((2048, 1024), (4, 2), 16 * _MIB, largest_order=16),
    "TPU v5 lite": TpuTile((16384, 16384), (4, 4), 110 * _MIB),
    "TPU v5": TpuTile((8192, 8192), (4, 4), 60 * _MIB),
    "TPU v6 lite": TpuTile((16384, 16384), (4, 4), 110 * _MIB),
    "TPU7x": TpuTile((8192, 8192), (4, 4), 60 * _MIB),
}
# Where the compiler's estimate is well below that of `xla`: not on v4, nor where nothing is known.
TPUS_FASTER_THAN_XLA = ("TPU v5 lite", "TPU v5", "TPU v6 lite")
_ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def tile_for(device_kind: str | None) -> TpuTile:
    """The tile of a TPU.

    Args:
      device_kind: as JAX names it; None if no TPU is known, which gets what every one can run.

    Raises:
      ValueError: a device without an entry.
    """
    if device_kind is None:
        return TILES["TPU v4"]
    kind = _ALIASES.get(device_kind, device_kind)
    if kind not in TILES:
        raise ValueError(
            f"no tile of CEMA's kernels is known for {device_kind!r}; known are "
            f"{', '.join(TILES)}: add an entry to tpu_block_sizes.TILES"
        )
    return TILES[kind]
