"""Block sizes of the TPU kernels by generation. README.md has the estimates behind them."""

from typing import NamedTuple

from pallas_kernels.common.devices import DEFAULT_VMEM, TPU_VMEM, canonical_tpu_kind

# A vector register has 128 lanes. Head widths are padded to multiples of it, and the backward
# kernel keeps queries in lanes.
LANES = 128
SMALLEST_BLOCK = LANES


class AttentionTpuBlocks(NamedTuple):
    """Block sizes, powers of two from 128 on.

    Attributes:
      queries: queries of a forward grid step, a multiple of `keys`.
      keys: keys of a forward grid step.
      backward: queries and keys of a backward grid step.
      vmem_limit: bytes of VMEM that a kernel may use.
    """

    queries: int
    keys: int
    backward: int
    vmem_limit: int

    def halved(self) -> "AttentionTpuBlocks":
        """The next smaller blocks."""
        queries, keys, backward = (max(SMALLEST_BLOCK, size // 2) for size in self[:3])
        return AttentionTpuBlocks(queries, keys, backward, self.vmem_limit)


class HeadSizes(NamedTuple):
    """Padded widths of a head, and bytes of a number.

    Attributes:
      key_width: of a query or key head, a multiple of 128.
      value_width: of a value head, a multiple of 128.
      key_bytes: of a number of q and k.
      value_bytes: of a number of v.
    """

    key_width: int
    value_width: int
    key_bytes: int
    value_bytes: int


# By `device_kind`.
BLOCKS = {
    "TPU v4": AttentionTpuBlocks(256, 256, 256, TPU_VMEM["TPU v4"]),
    "TPU v5 lite": AttentionTpuBlocks(512, 512, 512, TPU_VMEM["TPU v5 lite"]),
    "TPU v5": AttentionTpuBlocks(512, 512, 512, TPU_VMEM["TPU v5"]),
    "TPU v6 lite": AttentionTpuBlocks(512, 512, 512, TPU_VMEM["TPU v6 lite"]),
}
INTERPRETED_BLOCKS = AttentionTpuBlocks(
    2 * SMALLEST_BLOCK, SMALLEST_BLOCK, SMALLEST_BLOCK, DEFAULT_VMEM
)
# Where the compiler's estimate is below that of `xla`.
TPUS_FASTER_THAN_XLA = ("TPU v5 lite", "TPU v5", "TPU v6 lite")
# Shorter rows fill less than one block of queries.
SHORTEST_LENGTH = 512


def find_blocks(device_kind: str, heads: HeadSizes, chunk_size: int) -> AttentionTpuBlocks | None:
    """The largest blocks, up to the table's, that fit into VMEM; None if none fit.

    Args:
      device_kind: the TPU as JAX names it.
      heads: sizes of heads.
      chunk_size: tokens in a chunk.

    Raises:
      ValueError: the table does not list the TPU.
    """
    kind = canonical_tpu_kind(device_kind)
    if kind not in BLOCKS:
        raise ValueError(
            f"chunk attention has no block sizes for {device_kind!r}, only for "
            f"{', '.join(BLOCKS)}; add an entry to pallas_tpu.block_sizes.BLOCKS"
        )
    blocks = BLOCKS[kind]
    while blocks.vmem_limit < max(
        _backward_bytes(blocks.backward, heads, chunk_size), _forward_bytes(blocks, heads)
    ):
        if blocks == blocks.halved():
            return None
        blocks = blocks.halved()
    return blocks


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def _forward_bytes(blocks: AttentionTpuBlocks, heads: HeadSizes) -> int:
    Dk, Dv, k_bytes, v_bytes = heads
    # Operands and results have two buffers each.
    moved = 2 * (blocks.queries + blocks.keys) * (Dk * k_bytes + Dv * v_bytes)
    scratch = blocks.queries * (Dv + 3 * LANES) * 4
    scores_and_products = blocks.queries * (3 * blocks.keys + Dv) * 4
    return moved + scratch + scores_and_products


def _backward_bytes(size: int, heads: HeadSizes, chunk_size: int) -> int:
    Dk, Dv, k_bytes, v_bytes = heads
    moved = 2 * size * (4 * Dk * k_bytes + 3 * Dv * v_bytes)
    # The ring of dq is one chunk long.
    scratch = (round_up(chunk_size, size) + 2 * size) * Dk * 4 + size * Dv * 4
    scores_and_products = size * (5 * size + Dv) * 4
    return moved + scratch + scores_and_products
