"""States and slopes between the splits of a row, in Triton: a program has some groups of a row.

    timestep_norm_previous_states    moments before every split, from those of the splits
    timestep_norm_next_slopes        S and T after every split, from those of the splits

Both are scans over the splits of a row, which begin anew where a document does.
"""

import triton
import triton.language as tl

from pallas_kernels.common.triton import device_function
from pallas_kernels.timestep_norm.triton.kernels import (
    COUNT,
    FLAGS,
    FROM_START,
    LATER_DOCUMENT,
    TILE,
)


@device_function
def find_groups(GB: tl.constexpr, GROUPS: tl.constexpr):
    """Groups of this program, along the second axis, and which of them exist."""
    groups = (tl.program_id(0) * GB + tl.arange(0, GB))[None, :]
    return groups, groups < GROUPS


@device_function
def load_last_info(token_info, row, split, tiles, tiles_per_split, in_row, WHICH: tl.constexpr):
    """A row of `TimestepNormDocuments.token_info` of the last token of every split."""
    tile = tl.minimum((split + 1) * tiles_per_split, tiles) - 1
    at = ((row.to(tl.int64) * tiles + tile) * 4 + WHICH) * TILE + (TILE - 1)
    return tl.load(token_info + at, mask=in_row, other=0)


@device_function
def starts_document(token_info, row, split, tiles, tiles_per_split, in_row):
    """Whether the document that a split ends in starts in it."""
    from_start = load_last_info(token_info, row, split, tiles, tiles_per_split, in_row, FROM_START)
    tokens = tl.minimum(tiles_per_split, tiles - split * tiles_per_split) * TILE
    return in_row & (from_start < tokens)


@triton.jit
def two_sum(a, b):
    """a + b, and what its rounding lost (Knuth)."""
    total = a + b
    added = total - a
    return total, (a - (total - added)) + (b - added)


@triton.jit
def merge_moments(
    starts_a, count_a, mean_a, lost_a, squares_a, starts_b, count_b, mean_b, lost_b, squares_b
):  # fmt: skip
    """Chan's rule: moments of a, then b; those of b alone if a document starts there.

    `lost` is what the rounding of the mean lost.
    """
    count = count_a + count_b
    share = count_b / tl.maximum(count, 1.0)
    delta = (mean_b - mean_a) + (lost_b - lost_a)
    mean, lost = two_sum(mean_a, delta * share)
    squares = (squares_a + squares_b) + delta * delta * (count_a * share)
    is_alone = (starts_b != 0) | (count_a == 0.0)
    return (
        starts_a | starts_b,
        tl.where(is_alone, count_b, count),
        tl.where(is_alone, mean_b, mean),
        tl.where(is_alone, lost_b, lost + lost_a),
        tl.where(is_alone, squares_b, squares),
    )


@device_function
def load_moments(count, mean, var, at_count, at, mask):
    """Count, mean and squares of a state."""
    tokens = tl.load(count + at_count).to(tl.float32)
    return tokens, tl.load(mean + at, mask=mask, other=0.0), tokens * tl.load(
        var + at, mask=mask, other=0.0
    )  # fmt: skip


@triton.jit
def timestep_norm_previous_states(
    summaries, initial_count, initial_mean, initial_var, prior_count, prior_mean, prior_var,
    token_info, tiles, tiles_per_split, num_splits, states,
    GROUPS: tl.constexpr, GB: tl.constexpr, SPLITS: tl.constexpr, PACKED: tl.constexpr,
    STARTS_EMPTY: tl.constexpr,
):  # fmt: skip
    """Writes (B, S, G, 3): pivot, sum around it and squares before every split."""
    row = tl.program_id(1)
    groups, is_group = find_groups(GB, GROUPS)
    split = tl.arange(0, SPLITS)[:, None]
    in_row = split < num_splits - 1
    mask = in_row & is_group
    at = summaries + ((row.to(tl.int64) * (num_splits - 1) + split) * GROUPS + groups) * 4
    count = tl.load(at, mask=mask, other=0.0)
    mean, lost = two_sum(
        tl.load(at + 1, mask=mask, other=0.0), tl.load(at + 2, mask=mask, other=0.0)
    )
    squares = tl.load(at + 3, mask=mask, other=0.0)
    starts = split == 0
    if PACKED:
        starts = starts | starts_document(token_info, row, split, tiles, tiles_per_split, in_row)
    starts = tl.where(starts & is_group, 1, 0)
    zero = tl.full([1, GB], 0.0, tl.float32)
    first = (zero, zero, zero)
    if not STARTS_EMPTY:
        first = load_moments(
            initial_count, initial_mean, initial_var, row, row.to(tl.int64) * GROUPS + groups,
            is_group,
        )  # fmt: skip
        before = first
        if PACKED:
            later = load_moments(prior_count, prior_mean, prior_var, 0, groups, is_group)
            flags = load_last_info(token_info, row, split, tiles, tiles_per_split, in_row, FLAGS)
            is_later = (flags & LATER_DOCUMENT) != 0
            before = (
                tl.where(is_later, later[0], first[0]),
                tl.where(is_later, later[1], first[1]),
                tl.where(is_later, later[2], first[2]),
            )
        _, all_count, all_mean, all_lost, all_squares = merge_moments(
            starts, before[0], before[1], 0.0, before[2], 0, count, mean, lost, squares
        )
        count = tl.where(starts != 0, all_count, count)
        mean = tl.where(starts != 0, all_mean, mean)
        lost = tl.where(starts != 0, all_lost, lost)
        squares = tl.where(starts != 0, all_squares, squares)
    _, count, mean, lost, squares = tl.associative_scan(
        (starts, count, mean, lost, squares), 0, merge_moments
    )
    out = states + (row.to(tl.int64) * num_splits * GROUPS + groups) * 3
    tl.store(out, first[1], mask=is_group)
    tl.store(out + 1, zero, mask=is_group)
    tl.store(out + 2, first[2], mask=is_group)
    out += (split + 1) * GROUPS * 3
    tl.store(out, mean, mask=mask)
    tl.store(out + 1, count * lost, mask=mask)
    tl.store(out + 2, squares, mask=mask)


@triton.jit
def add_slopes(starts_a, s_a, t_a, pivot_a, starts_b, s_b, t_b, pivot_b):
    """Slopes of b and of a, which is later, around b's pivot; b's alone if a document starts there.

    The pivots of a document are near each other.
    """
    from_a = t_a - 2.0 * (pivot_a - pivot_b) * s_a
    is_alone = starts_b != 0
    return (
        starts_a | starts_b,
        tl.where(is_alone, s_b, s_b + s_a),
        tl.where(is_alone, t_b, t_b + from_a),
        pivot_b,
    )


@triton.jit
def timestep_norm_next_slopes(
    slopes, states, pivots, d_mean, d_var, final_mean, initial_count, token_info, tiles,
    tiles_per_split, num_splits, out,
    GROUPS: tl.constexpr, GB: tl.constexpr, SPLITS: tl.constexpr, PACKED: tl.constexpr,
    STARTS_EMPTY: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Writes (B, S, G, 2): S and T after every split, around the pivot of its last token."""
    row = tl.program_id(1)
    groups, is_group = find_groups(GB, GROUPS)
    # From the row's end: after the last split comes the final state, then the last split itself.
    split = num_splits - 1 - tl.arange(0, SPLITS)[:, None]
    in_row = split >= 0
    mask = in_row & is_group
    has_split = in_row & (split < num_splits - 1)
    mask_split = has_split & is_group
    at = slopes + ((row.to(tl.int64) * (num_splits - 1) + split) * GROUPS + groups) * 2
    s = tl.load(at, mask=mask_split, other=0.0)
    t = tl.load(at + 1, mask=mask_split, other=0.0)
    at_split = (row.to(tl.int64) * num_splits + split) * GROUPS + groups
    pivot = tl.load(states + (at_split + GROUPS) * 3, mask=mask_split, other=0.0)
    if HAS_FINAL:
        at_row = row.to(tl.int64) * GROUPS + groups
        count = tiles * TILE
        if PACKED:
            count = load_last_info(
                token_info, row, num_splits - 1, tiles, tiles_per_split, True, COUNT
            )
        elif not STARTS_EMPTY:
            count += tl.load(initial_count + row)
        each = 1.0 / tl.maximum(count, 1).to(tl.float32)
        is_final = split == num_splits - 1
        s += tl.where(is_final, tl.load(d_var + at_row, mask=is_group, other=0.0) * each, 0.0)
        t += tl.where(is_final, tl.load(d_mean + at_row, mask=is_group, other=0.0) * each, 0.0)
        last_mean = tl.load(final_mean + at_row, mask=is_group, other=0.0)
        pivot = tl.where(is_final, last_mean, pivot)
    starts = tl.full([SPLITS, GB], 0, tl.int32)
    if PACKED:
        found = starts_document(token_info, row, split + 1, tiles, tiles_per_split, has_split)
        starts = tl.where(found & is_group, 1, 0)
    _, s, t, pivot = tl.associative_scan((starts, s, t, pivot), 0, add_slopes)
    t -= 2.0 * (pivot - tl.load(pivots + at_split, mask=mask, other=0.0)) * s
    tl.store(out + at_split * 2, s, mask=mask)
    tl.store(out + at_split * 2 + 1, t, mask=mask)
