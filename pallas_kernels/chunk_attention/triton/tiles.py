"""Tiles of tokens in Triton: loads and stores, products, and the pairs that see each other.

Arrays are (rows, tokens, heads, width). A head is found by its pointer, and tokens are STRIDE
numbers apart. Widths are padded with zeros to BLOCK, a power of two.
"""

import triton
import triton.language as tl

from pallas_kernels.common.triton import device_function

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@device_function
def find_tile(num_tokens, SIZE: tl.constexpr, HEADS: tl.constexpr):
    """Row, head and tile of a program; the last tiles, whose queries see most keys, come first."""
    tiles = (num_tokens + SIZE - 1) // SIZE
    row_head = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    return row_head // HEADS, row_head % HEADS, tile


@device_function
def find_head(pointer, row, head, num_tokens, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointer to the first token of a row's head."""
    return pointer + row.to(tl.int64) * num_tokens * (HEADS * WIDTH) + head * WIDTH


@device_function
def find_columns(first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of a head from `first` on, and which of them exist."""
    columns = first + tl.arange(0, BLOCK)
    return columns, columns < WIDTH


@device_function
def load_tile(
    pointer, first, num_tokens, first_column, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(SIZE, BLOCK) of the tokens from `first` on; zero where there are none."""
    token = tl.arange(0, SIZE)
    columns, exists = find_columns(first_column, WIDTH, BLOCK)
    at = pointer + tl.cast(first, tl.int64) * STRIDE + (token[:, None] * STRIDE + columns[None, :])
    mask = (first + token < num_tokens)[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & exists[None, :]
    return tl.load(at, mask=mask, other=0.0)


@device_function
def store_tile(
    pointer, values, first, num_tokens, first_column, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes what `load_tile` reads, in the array's dtype."""
    token = tl.arange(0, SIZE)
    columns, exists = find_columns(first_column, WIDTH, BLOCK)
    at = pointer + tl.cast(first, tl.int64) * STRIDE + (token[:, None] * STRIDE + columns[None, :])
    mask = (first + token < num_tokens)[:, None] & exists[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=mask)


@device_function
def load_numbers(pointer, first, num_tokens, SIZE: tl.constexpr):
    """One number of each of SIZE tokens; 0 where there are none."""
    tokens = first + tl.arange(0, SIZE)
    return tl.load(pointer + tokens, mask=tokens < num_tokens, other=0)


@device_function
def round_as(values, tile):
    """float32 values in the dtype of a tile."""
    if INTERPRETED:  # It truncates to bfloat16, where GPUs round to the nearest.
        if tile.dtype == tl.bfloat16:
            bits = values.to(tl.uint32, bitcast=True)
            values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return values.to(tile.dtype)


@device_function
def multiply(a, b, total):
    """total + a b, in full precision for float32."""
    if INTERPRETED:  # It multiplies the bits of bfloat16 as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@device_function
def multiply_heads(
    a, b, a_first, b_first, a_tokens, b_tokens, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """(A, B) products of the heads of A tokens and B tokens, SLICE columns at a time."""
    total = tl.full([A, B], 0.0, tl.float32)
    for column in range(0, WIDTH, SLICE):
        left = load_tile(a, a_first, a_tokens, column, STRIDE, WIDTH, A, SLICE)
        right = load_tile(b, b_first, b_tokens, column, STRIDE, WIDTH, B, SLICE)
        total = multiply(left, tl.trans(right), total)
    return total
