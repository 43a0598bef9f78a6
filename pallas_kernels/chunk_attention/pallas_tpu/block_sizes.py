"""Blocks of chunk attention on TPU by generation. README.md has the estimates behind them."""

from typing import NamedTuple

_MIB = 2**20
# Rows of queries lie in lanes in the backward kernel, and a register has 128.
SMALLEST_BLOCK = 128


class TpuBlocks(NamedTuple):
    """How one TPU generation runs the kernels; blocks are powers of two, at least 128.

    Attributes:
      queries: of a forward grid step, a multiple of `keys`.
      keys: of a forward grid step.
      backward: queries and keys of a backward grid step.
      vmem_limit: bytes that a kernel may use.
    """

    queries: int
    keys: int
    backward: int
    vmem_limit: int

    def halved(self) -> "TpuBlocks":
        """The next smaller blocks."""
        queries, keys, backward = (max(SMALLEST_BLOCK, size // 2) for size in self[:3])
        return TpuBlocks(queries, keys, backward, self.vmem_limit)


# By `device_kind`.
BLOCKS = {
    "TPU v4": TpuBlocks(256, 256, 256, 16 * _MIB),
    "TPU v5 lite": TpuBlocks(512, 512, 512, 110 * _MIB),
    "TPU v5": TpuBlocks(512, 512, 512, 60 * _MIB),
    "TPU v6 lite": TpuBlocks(512, 512, 512, 110 * _MIB),
}
# Where the compiler's estimate is below that of `xla`.
TPUS_FASTER_THAN_XLA = ("TPU v5 lite", "TPU v5", "TPU v6 lite")
# Shorter rows fill less than one block of queries.
SHORTEST_LENGTH = 512
_ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def blocks_for(device_kind: str | None) -> TpuBlocks:
    """The blocks of a TPU.

    Args:
      device_kind: as JAX names it; None for the interpreter, which gets the smallest.

    Raises:
      ValueError: a device without an entry.
    """
    if device_kind is None:
        return TpuBlocks(2 * SMALLEST_BLOCK, SMALLEST_BLOCK, SMALLEST_BLOCK, 16 * _MIB)
    kind = _ALIASES.get(device_kind, device_kind)
    if kind not in BLOCKS:
        raise ValueError(
            f"no blocks of chunk attention's kernels are known for {device_kind!r}; known are "
            f"{', '.join(BLOCKS)}: add an entry to tpu_block_sizes.BLOCKS"
        )
    return BLOCKS[kind]
