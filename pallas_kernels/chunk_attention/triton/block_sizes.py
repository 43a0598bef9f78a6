"""Tiles of the Triton kernels, by the widths of heads and the shared memory of the card.

The sizes fit into the shared memory of every card. At the widths of the shipped models they spill
no registers (tests/kernels/chunk_attention/test_triton_aot.py). Nobody has timed them or others.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

Pass = Literal["forward", "output", "query_gradient", "key_gradient", "value_gradient"]
Width = Literal["small", "medium", "wide", "float32 small", "float32 wide"]

# A tile of wider keys would leave too few registers for the sums.
MAX_KEY_WIDTH = 256
# The shortest side of a matrix that the tensor cores multiply.
_SMALLEST_BLOCK = 16
# Largest padded widths (key, value) of heads of which a tile holds all columns.
_NARROW: dict[Width, tuple[int, int]] = {
    "small": (64, 128), "medium": (128, 256), "float32 small": (64, 128),
}  # fmt: skip
# Wider values are cut: into blocks of the sums, and into slices of the products over columns.
_MAX_VALUE_BLOCK = {"wide": 512, "float32 wide": 128}
_VALUE_SLICE = {"wide": 64, "float32 wide": 32}
# Columns of 32-bit queries and keys at a time: more operands of a product fill the registers.
_FLOAT32_KEY_SLICE = 32
# Bytes of shared memory of a block from which `deep_stages` fit: all but sm_86, sm_89, sm_120.
_DEEP = 160 * 1024


class TileSizes(NamedTuple):
    """Sizes of one kernel for one class of widths.

    Attributes:
      queries: queries of a tile.
      keys: keys of a tile.
      num_warps: warps of a program.
      stages: stages of the loop over tiles.
      deep_stages: stages on cards with 160 KiB of shared memory or more.
    """

    queries: int
    keys: int
    num_warps: int
    stages: int
    deep_stages: int


# 32-bit products are not made by tensor cores: their operands fill registers.
_FLOAT32 = TileSizes(queries=32, keys=32, num_warps=4, stages=1, deep_stages=1)
SIZES: dict[tuple[Width, Pass], TileSizes] = {
    ("small", "forward"): TileSizes(64, 64, 4, 3, 3),
    ("small", "query_gradient"): TileSizes(64, 64, 4, 2, 3),
    ("small", "key_gradient"): TileSizes(32, 32, 4, 2, 3),
    ("medium", "forward"): TileSizes(64, 64, 8, 2, 3),
    ("medium", "query_gradient"): TileSizes(64, 32, 8, 2, 3),
    ("medium", "key_gradient"): TileSizes(32, 32, 4, 2, 3),
    ("wide", "forward"): TileSizes(64, 64, 4, 3, 3),
    ("wide", "output"): TileSizes(64, 32, 8, 2, 3),
    ("wide", "query_gradient"): TileSizes(64, 64, 8, 3, 3),
    ("wide", "key_gradient"): TileSizes(64, 64, 8, 3, 3),
    ("wide", "value_gradient"): TileSizes(32, 64, 8, 2, 3),
    ("float32 small", "forward"): _FLOAT32,
    ("float32 small", "query_gradient"): _FLOAT32,
    ("float32 small", "key_gradient"): _FLOAT32,
    ("float32 wide", "forward"): _FLOAT32,
    ("float32 wide", "output"): _FLOAT32,
    ("float32 wide", "query_gradient"): _FLOAT32,
    ("float32 wide", "key_gradient"): _FLOAT32,
    ("float32 wide", "value_gradient"): _FLOAT32,
}


class AttentionTiles(NamedTuple):
    """How a kernel divides a call.

    Attributes:
      queries: queries of a tile.
      keys: keys of a tile.
      key_block: columns of a query or key, padded to a power of two.
      key_slice: columns of a query or key that the kernels of scores multiply at a time.
      value_block: columns of a value at a time, a power of two.
      is_narrow: whether `value_block` holds all columns of a value.
      num_warps: warps of a program.
      num_stages: stages of the loop over tiles.
    """

    queries: int
    keys: int
    key_block: int
    key_slice: int
    value_block: int
    is_narrow: bool
    num_warps: int
    num_stages: int


def choose_tiles(
    which: Pass, key_width: int, value_width: int, dtype: Any, shared_memory: int
) -> AttentionTiles:
    """The tiles of one kernel.

    Args:
      which: the kernel.
      key_width: width of a head of q and k, at most 256.
      value_width: width of a head of v.
      dtype: the wider one of q's and v's.
      shared_memory: bytes of it that a block may use.
    """
    key_block, value_block = _power_of_two(key_width), _power_of_two(value_width)
    width = _find_width(key_block, value_block, dtype)
    is_narrow = width in _NARROW
    if width == "medium":
        # With fewer columns of a key Triton arranges the sums in a way that spills.
        key_block = max(key_block, 64)
    if not is_narrow and which in ("output", "value_gradient"):
        value_block = _cheapest_block(key_block, value_width, _MAX_VALUE_BLOCK[width])
    elif not is_narrow:
        value_block = _VALUE_SLICE[width]
    queries, keys, num_warps, stages, deep_stages = SIZES[width, which]
    num_stages = deep_stages if shared_memory >= _DEEP else stages
    key_slice = min(key_block, _FLOAT32_KEY_SLICE) if width == "float32 wide" else key_block
    return AttentionTiles(
        queries, keys, key_block, key_slice, value_block, is_narrow, num_warps, num_stages
    )


def _find_width(key_block: int, value_block: int, dtype: Any) -> Width:
    classes: tuple[Width, ...] = ("small", "medium")
    widest: Width = "wide"
    if jnp.dtype(dtype) == jnp.float32:
        classes, widest = ("float32 small",), "float32 wide"
    for width in classes:
        if key_block <= _NARROW[width][0] and value_block <= _NARROW[width][1]:
            return width
    return widest


def _cheapest_block(key_block: int, value_width: int, largest: int) -> int:
    """The block of value columns with the least products: every block computes its scores."""
    blocks = [1 << i for i in range(4, largest.bit_length())]
    return min(reversed(blocks), key=lambda block: -(-value_width // block) * (key_block + block))


def _power_of_two(width: int) -> int:
    return max(_SMALLEST_BLOCK, 1 << (width - 1).bit_length())
