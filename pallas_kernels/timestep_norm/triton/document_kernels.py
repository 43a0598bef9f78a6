"""`TimestepNormDocuments.token_info` of segment ids in Triton: two kernels over blocks of tokens.

    timestep_norm_block_documents    the first and the last document of every block
    timestep_norm_token_info         counts, distances and flags of a block's tokens

Segment ids grow along a row, so that the documents of other blocks matter by maxima, minima and
sums over blocks.
"""

# A scan returns a tensor or a tuple of them.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl
from triton.language.standard import _elementwise_max as larger
from triton.language.standard import _elementwise_min as smaller
from triton.language.standard import _sum_combine as add

from pallas_kernels.common.triton import device_function
from pallas_kernels.timestep_norm.triton.kernels import (
    COUNT,
    DOCUMENT_START,
    FEEDS_NEXT_SPLIT,
    FEEDS_PREVIOUS_SPLIT,
    FLAGS,
    FROM_START,
    LATER_DOCUMENT,
    TILE,
    TO_END,
    VALID,
)

# Numbers of a block: the largest id, its tokens and the first one's index; the smallest id, its
# first token's index, and that of the first token of a larger id. NEVER where there is none.
LAST_ID = tl.constexpr(0)
LAST_TOKENS = tl.constexpr(1)
LAST_INDEX = tl.constexpr(2)
FIRST_ID = tl.constexpr(3)
FIRST_INDEX = tl.constexpr(4)
SECOND_INDEX = tl.constexpr(5)
NUMBERS = tl.constexpr(6)
NEVER = tl.constexpr(2147483647)


@triton.jit
def running_max(a, b):
    return tl.maximum(a, b)


@triton.jit
def running_min(a, b):
    return tl.minimum(a, b)


@device_function
def load_ids(segment_ids, row, index, length, is_token):
    return tl.load(segment_ids + row.to(tl.int64) * length + index, mask=is_token, other=0)


@device_function
def least_where(condition, values):
    return tl.reduce(tl.where(condition, values, NEVER), 0, smaller)


@triton.jit
def timestep_norm_block_documents(segment_ids, length, blocks, BLOCK: tl.constexpr):
    """Writes (B, blocks, 6)."""
    number = tl.program_id(0)
    row = tl.program_id(1)
    index = number * BLOCK + tl.arange(0, BLOCK)
    ids = load_ids(segment_ids, row, index, length, index < length)
    last = tl.reduce(ids, 0, larger)
    first = least_where(ids != 0, ids)
    is_last = (ids == last) & (ids != 0)
    out = blocks + (row * tl.num_programs(0) + number) * NUMBERS
    tl.store(out + LAST_ID, last)
    tl.store(out + LAST_TOKENS, tl.reduce(tl.where(is_last, 1, 0), 0, add))
    tl.store(out + LAST_INDEX, least_where(is_last, index))
    tl.store(out + FIRST_ID, first)
    tl.store(out + FIRST_INDEX, least_where(ids == first, index))
    tl.store(out + SECOND_INDEX, least_where(ids > first, index))


@triton.jit
def timestep_norm_token_info(
    segment_ids, blocks, initial_count, prior_count, length, split, token_info,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STARTS_EMPTY: tl.constexpr,
):  # fmt: skip
    """Writes (B, tiles, 4, 128); `split` is the number of tokens of a split."""
    number = tl.program_id(0)
    row = tl.program_id(1)
    other = tl.arange(0, BLOCKS)
    at = blocks + (row * tl.num_programs(0) + other) * NUMBERS
    is_before = other < number
    is_after = (other > number) & (other < tl.num_programs(0))
    last = tl.load(at + LAST_ID, mask=is_before | is_after, other=0)
    first = tl.load(at + FIRST_ID, mask=is_before | is_after, other=NEVER)
    # The document that this block begins in, and the row's first one; 0 if there is none before.
    id_before = tl.reduce(tl.where(is_before, last, 0), 0, larger)
    is_same = is_before & (last == id_before) & (last != 0)
    tokens = tl.load(at + LAST_TOKENS, mask=is_same, other=0)
    tokens_before = tl.reduce(tokens, 0, add)
    start_before = least_where(is_same, tl.load(at + LAST_INDEX, mask=is_same, other=0))
    start_before = tl.where(id_before == 0, 0, start_before)
    row_id = least_where(is_before, first)

    index = number * BLOCK + tl.arange(0, BLOCK)
    is_token = index < length
    ids = load_ids(segment_ids, row, index, length, is_token)
    is_inside = is_token & (index > number * BLOCK)
    ids_before = load_ids(segment_ids, row, index - 1, length, is_inside)
    largest = tl.associative_scan(tl.maximum(ids, id_before), 0, running_max)
    largest_before = tl.associative_scan(tl.maximum(ids_before, id_before), 0, running_max)
    valid = ids != 0
    is_start = valid & (ids != largest_before)
    row_id = tl.minimum(row_id, least_where(valid, ids))
    is_later = largest > row_id
    start = tl.associative_scan(tl.where(is_start, index, start_before), 0, running_max)
    counted = tl.associative_scan(tl.where(valid, 1, 0), 0, add)
    at_start = tl.where(is_start, counted - 1, -tokens_before)
    count = counted - tl.associative_scan(at_start, 0, running_max)
    if not STARTS_EMPTY:
        of_first = tl.load(initial_count + row)
        count += tl.where(is_later, tl.load(prior_count), of_first)

    # The next document's first token: of this block, of one after it, or the row's end.
    id_after = tl.maximum(id_before, tl.reduce(ids, 0, larger))
    first_index = tl.load(at + FIRST_INDEX, mask=is_after, other=NEVER)
    second_index = tl.load(at + SECOND_INDEX, mask=is_after, other=NEVER)
    next_start = least_where(is_after, tl.where(first > id_after, first_index, second_index))
    next_start = tl.minimum(next_start, length)
    is_inside = (index + 1 < length) & (index + 1 < (number + 1) * BLOCK)
    next_ids = load_ids(segment_ids, row, index + 1, length, is_inside)
    is_end = (next_ids != 0) & (next_ids != largest)
    ends = tl.where(is_end, index, next_start - 1)
    end = tl.associative_scan(ends, 0, running_min, reverse=True)

    split_start = index // split * split
    feeds_next = end >= tl.minimum(split_start + split, length) - 1
    feeds_previous = (start < split_start) | (largest <= row_id)
    flags = (
        tl.where(valid, VALID, 0)
        + tl.where(is_start, DOCUMENT_START, 0)
        + tl.where(is_later, LATER_DOCUMENT, 0)
        + tl.where(feeds_next, FEEDS_NEXT_SPLIT, 0)
        + tl.where(feeds_previous, FEEDS_PREVIOUS_SPLIT, 0)
    )
    out = token_info + (row.to(tl.int64) * length + index // TILE * TILE) * 4 + index % TILE
    tl.store(out + COUNT * TILE, count, mask=is_token)
    tl.store(out + FROM_START * TILE, index - start, mask=is_token)
    # The slopes of the final state continue into the row's last document.
    to_end = end - index + tl.where(end == length - 1, 1, 0)
    tl.store(out + TO_END * TILE, to_end, mask=is_token)
    tl.store(out + FLAGS * TILE, flags, mask=is_token)
