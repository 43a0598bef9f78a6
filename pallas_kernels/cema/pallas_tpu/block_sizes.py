"""Block sizes of CEMA's TPU kernels by generation; README.md has the compiler's estimates."""

from typing import NamedTuple

from pallas_kernels.common.devices import TPU_VMEM, canonical_tpu_kind

# The kernels load registers of 8 sublanes, each a block of 128 tokens.
SMALLEST_TILE = 1024


class CemaTpuBlockSizes(NamedTuple):
    """How one TPU generation runs the kernels; pairs are (forward, backward).

    Attributes:
      tokens: of one grid step, for bfloat16 and N up to 16; multiples of 1,024, the second divides
        the first.
      unroll: groups of channels in flight at once.
      vmem_limit: bytes of VMEM that a kernel may use.
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


def _sizes(kind: str, tokens: tuple[int, int], unroll: tuple[int, int], largest_order: int = 32):
    return CemaTpuBlockSizes(tokens, unroll, TPU_VMEM[kind], largest_order)


# By `device_kind`.
TILES = {
    "TPU v4": _sizes("TPU v4", (2048, 1024), (4, 2), largest_order=16),
    "TPU v5 lite": _sizes("TPU v5 lite", (16384, 16384), (4, 4)),
    "TPU v5": _sizes("TPU v5", (8192, 8192), (4, 4)),
    "TPU v6 lite": _sizes("TPU v6 lite", (16384, 16384), (4, 4)),
    "TPU7x": _sizes("TPU7x", (8192, 8192), (4, 4)),
}
# Where the compiler's estimate is well below that of `xla`: not on v4, nor without an estimate.
TPUS_FASTER_THAN_XLA = ("TPU v5 lite", "TPU v5", "TPU v6 lite")


def tile_for(device_kind: str | None) -> CemaTpuBlockSizes:
    """The block sizes of a TPU.

    Args:
      device_kind: as JAX names it; None if no TPU is known: sizes that run on every TPU.

    Raises:
      ValueError: a device without an entry.
    """
    if device_kind is None:
        return TILES["TPU v4"]
    kind = canonical_tpu_kind(device_kind)
    if kind not in TILES:
        raise ValueError(
            f"CEMA's kernels have no block sizes for {device_kind!r}, only for "
            f"{', '.join(TILES)}: add an entry to TILES in pallas_tpu/block_sizes.py"
        )
    return TILES[kind]
