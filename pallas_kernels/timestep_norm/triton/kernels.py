"""TimestepNorm in Triton: one warp walks along a split of a row, GB groups of it at a time.

    timestep_norm_moments    count, mean and squares of every split
    timestep_norm_outputs    y, and for every token offset a = m - k, r = (v + eps)^(-1/2), pivot k
    timestep_norm_slopes     what a split's gradients add to those of earlier tokens
    timestep_norm_gradients  dx, and sums for the gradients of all else

With n the count of a token, g = dy scale, and sums over its F features,

    s = -½ r³ Σ g (x - m) / n      t = -r Σ g / n - 2 a s      S, T: sums of s, t from a token on
    dx = g r + (T + 2 (x - k) S) / F

A token's features are along the threads; moments of a group are the same number in all threads that
share it. The next tokens are on their way while a warp works on the present ones.
Documents are selections, so that they are isolated bit by bit.
"""

import triton
import triton.language as tl
from triton.language.standard import _sum_combine as add

from pallas_kernels.common.triton import device_function

# Flags of `TimestepNormDocuments.token_info`, and its rows.
VALID = tl.constexpr(1)
DOCUMENT_START = tl.constexpr(2)
LATER_DOCUMENT = tl.constexpr(4)
FEEDS_NEXT_SPLIT = tl.constexpr(8)
FEEDS_PREVIOUS_SPLIT = tl.constexpr(16)
COUNT = tl.constexpr(0)
FROM_START = tl.constexpr(1)
TO_END = tl.constexpr(2)
FLAGS = tl.constexpr(3)
TILE = tl.constexpr(128)


@device_function
def load_tokens(pointer, at, in_group, D: tl.constexpr, UNROLL: tl.constexpr):
    """UNROLL successive tokens (GB, F), loaded together to overlap their latencies."""
    tokens = ()
    for u in tl.static_range(UNROLL):
        tokens = tokens + (tl.load(pointer + at + u * D, mask=in_group, other=0.0),)  # noqa: RUF005
    return tokens


@device_function
def find_tokens(split, tiles, tiles_per_split, UNROLL: tl.constexpr):
    """The split's first token, its end, and its last UNROLL tokens; none if it is after the row."""
    first = split * tiles_per_split * TILE
    last = tl.minimum(first + tiles_per_split * TILE, tiles * TILE)
    return first, last, last - UNROLL


@device_function
def load_each(pointer, step, UNROLL: tl.constexpr):
    """A number of each of UNROLL successive tokens; loads together do not wait for stores."""
    values = ()
    for u in tl.static_range(UNROLL):
        values = values + (tl.load(pointer + u * step),)  # noqa: RUF005
    return values


@device_function
def load_info(
    token_info, row, token, tiles, WHICH: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """A row of `TimestepNormDocuments.token_info` of UNROLL successive tokens of a tile."""
    tile = row.to(tl.int64) * tiles + token // TILE
    at = (tile * 4 + WHICH) * TILE + (token - token // TILE * TILE)
    return load_each(token_info + at, 1, UNROLL)


@device_function
def load_flags_and_counts(
    token_info, row, token, tiles, PACKED: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """Flags and counts of UNROLL successive tokens of a tile; none if the row is not packed."""
    flags = ()
    counts = ()
    if PACKED:
        flags = load_info(token_info, row, token, tiles, FLAGS, UNROLL)
        counts = load_info(token_info, row, token, tiles, COUNT, UNROLL)
    return flags, counts


@device_function
def mean_of(values, EACH: tl.constexpr):
    """Means over the features of a group, (GB,)."""
    return tl.reduce(values, 1, add) * EACH


@device_function
def token_moments(x, in_group, EACH: tl.constexpr):
    """A token's mean, what its rounding to float32 lost, and its variance."""
    mean = mean_of(x, EACH)
    deviation = tl.where(in_group, x - mean[:, None], 0.0)
    error = mean_of(deviation, EACH)
    var = tl.maximum(mean_of(deviation * deviation, EACH) - error * error, 0.0)
    return mean, error, var


@device_function
def find_block(GB: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr):
    """Groups of this program, its columns, and which of them are features."""
    groups = tl.program_id(0) * GB + tl.arange(0, GB)
    columns = tl.arange(0, F)[None, :]
    in_group = (columns < FEATURES) & (groups >= 0)[:, None]
    return groups, groups[:, None] * WIDTH + columns, in_group


@device_function
def feeds_next(flags):
    """Whether a token is of the document that its split ends in."""
    return (flags & (VALID | FEEDS_NEXT_SPLIT)) == (VALID | FEEDS_NEXT_SPLIT)


@device_function
def first_counted(xs, flags, PACKED: tl.constexpr, UNROLL: tl.constexpr):
    """The first token of successive ones that is counted; any if none is."""
    found = xs[0]
    if PACKED:
        found = xs[UNROLL - 1]
        for u in tl.static_range(UNROLL - 1):
            found = tl.where(feeds_next(flags[UNROLL - 2 - u]), xs[UNROLL - 2 - u], found)
    return found.to(tl.float32)


@triton.jit
def timestep_norm_moments(
    x, token_info, tiles, tiles_per_split, summaries,
    GROUPS: tl.constexpr, GB: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr,
    FEATURES: tl.constexpr, EACH: tl.constexpr, D: tl.constexpr, NUM_SPLITS: tl.constexpr,
    PACKED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Writes (B, J, G, 4): count, pivot, offset of the mean from it, squares around the mean."""
    groups, columns, in_group = find_block(GB, F, WIDTH, FEATURES)
    split = tl.program_id(1)
    row = tl.program_id(2)
    pivot = tl.full([GB], 0.0, tl.float32)
    offset = tl.full([GB], 0.0, tl.float32)
    squares = tl.full([GB], 0.0, tl.float32)
    count = 0.0
    first, last, final = find_tokens(split, tiles, tiles_per_split, UNROLL)
    at_start = row.to(tl.int64) * tiles * TILE
    ahead = (at_start + tl.minimum(first, final)) * D + columns
    following = load_tokens(x, ahead, in_group, D, UNROLL)
    for token in range(first, last, UNROLL):
        xs = following
        ahead = (at_start + tl.minimum(token + UNROLL, final)) * D + columns
        following = load_tokens(x, ahead, in_group, D, UNROLL)
        flags = ()
        if PACKED:
            flags = load_info(token_info, row, token, tiles, FLAGS, UNROLL)
        new_pivot = pivot
        if count == 0.0:
            new_pivot = mean_of(first_counted(xs, flags, PACKED, UNROLL), EACH)
        center = new_pivot + offset
        # The mean before these tokens, minus its rounded value, which they are compared with.
        lost = offset - (center - new_pivot)
        num_tokens = 0.0
        sums = tl.full([GB, F], 0.0, tl.float32)
        products = tl.full([GB, F], 0.0, tl.float32)
        for u in tl.static_range(UNROLL):
            deviation = tl.where(in_group, xs[u].to(tl.float32) - center[:, None], 0.0)
            if PACKED:
                is_counted = feeds_next(flags[u])
                deviation = tl.where(is_counted, deviation, 0.0)
                num_tokens += tl.where(is_counted, 1.0, 0.0)
            else:
                num_tokens += 1.0
            sums += deviation
            products += deviation * deviation
        if num_tokens > 0.0:
            mean = mean_of(sums, EACH) * (1.0 / num_tokens)
            share = num_tokens / (count + num_tokens)
            delta = mean - lost
            squares += tl.maximum(mean_of(products, EACH) - num_tokens * mean * mean, 0.0)
            squares += delta * delta * (count * share)
            pivot = new_pivot
            offset += delta * share
            count += num_tokens
    out = summaries + ((row.to(tl.int64) * NUM_SPLITS + split) * GROUPS + groups) * 4
    tl.store(out, tl.full([GB], 0.0, tl.float32) + count)
    tl.store(out + 1, pivot)
    tl.store(out + 2, offset)
    tl.store(out + 3, squares)


@device_function
def load_initial(
    initial, has_initial, at_row, row, WHICH: tl.constexpr, STARTS_EMPTY: tl.constexpr
):  # fmt: skip
    """The moments before a row's first document (0) or later ones (1): count > 0, mean, squares."""
    moments = (0, 0.0, 0.0)
    if not STARTS_EMPTY:
        at = initial + at_row * 4 + 2 * WHICH
        moments = (tl.load(has_initial + row * 2 + WHICH), tl.load(at), tl.load(at + 1))
    return moments


@device_function
def start_document(state, mean, flags, of_first, of_later):
    """The state (pivot, total, squares) before a token that may start a document."""
    pivot, total, squares = state
    is_start = (flags & DOCUMENT_START) != 0
    is_later = (flags & LATER_DOCUMENT) != 0
    has_moments = tl.where(is_later, of_later[0], of_first[0]) != 0
    start_pivot = tl.where(has_moments, tl.where(is_later, of_later[1], of_first[1]), mean)
    pivot = tl.where(is_start, start_pivot, pivot)
    squares = tl.where(is_start, tl.where(is_later, of_later[2], of_first[2]), squares)
    return pivot, tl.where(is_start, 0.0, total), squares


@device_function
def add_token(state, mean, error, var, count, share, valid, PACKED: tl.constexpr):
    """The state after a token; `count` includes it, `share` is 1 / count."""
    pivot, total, squares = state
    difference = (mean - pivot) + error
    if PACKED:
        difference = tl.where(valid, difference, 0.0)
    before = count - 1.0
    deviation = difference - total * (1.0 / tl.maximum(before, 1.0))
    summand = var + deviation * deviation * (before * share)
    if PACKED:
        summand = tl.where(valid, summand, 0.0)
    return pivot, total + difference, squares + summand


@triton.jit
def timestep_norm_outputs(
    x, scale, bias, previous_states, initial_count, token_info, initial, has_initial, tiles,
    tiles_per_split, num_splits, y, final_mean, final_var, statistics, pivots,
    GROUPS: tl.constexpr, GB: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr,
    FEATURES: tl.constexpr, EACH: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr,
    PACKED: tl.constexpr, STARTS_EMPTY: tl.constexpr, SAVE: tl.constexpr, STATISTICS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """y of a split; if SAVE the statistics of its tokens and the pivot of its last one."""
    groups, columns, in_group = find_block(GB, F, WIDTH, FEATURES)
    split = tl.program_id(1)
    row = tl.program_id(2)
    scales = tl.load(scale + columns, mask=in_group, other=0.0)
    biases = tl.load(bias + columns, mask=in_group, other=0.0)
    at_split = (row.to(tl.int64) * num_splits + split) * GROUPS + groups
    at_row = row.to(tl.int64) * GROUPS + groups
    before = previous_states + at_split * 3
    state = (tl.load(before), tl.load(before + 1), tl.load(before + 2))
    # Of the row's last token, for the final state.
    count = 1.0
    count_before = 0
    of_first = ()
    of_later = ()
    if PACKED:
        of_first = load_initial(initial, has_initial, at_row, row, 0, STARTS_EMPTY)
        of_later = load_initial(initial, has_initial, at_row, row, 1, STARTS_EMPTY)
    elif not STARTS_EMPTY:
        count_before = tl.load(initial_count + row)
    first, last, final = find_tokens(split, tiles, tiles_per_split, UNROLL)
    at_start = row.to(tl.int64) * tiles * TILE
    ahead = (at_start + tl.minimum(first, final)) * D + columns
    following = load_tokens(x, ahead, in_group, D, UNROLL)
    for token in range(first, last, UNROLL):
        at_token = at_start + token
        xs = following
        ahead = (at_start + tl.minimum(token + UNROLL, final)) * D + columns
        following = load_tokens(x, ahead, in_group, D, UNROLL)
        flags, counts = load_flags_and_counts(token_info, row, token, tiles, PACKED, UNROLL)
        for u in tl.static_range(UNROLL):
            values = xs[u].to(tl.float32)
            mean, error, var = token_moments(values, in_group, EACH)
            valid = True
            if PACKED:
                valid = (flags[u] & VALID) != 0
                count = tl.maximum(counts[u].to(tl.float32), 1.0)
                state = start_document(state, mean, flags[u], of_first, of_later)
            else:
                count = (count_before + token + (u + 1)).to(tl.float32)
                # A row that starts from nothing has its first token's mean as the pivot.
                state = (tl.where(count == 1.0, mean, state[0]), state[1], state[2])
            share = 1.0 / count
            state = add_token(state, mean, error, var, count, share, valid, PACKED)
            offset = state[1] * share
            rstd = tl.rsqrt(state[2] * share + EPS)
            out = ((values - state[0][:, None]) - offset[:, None]) * rstd[:, None] * scales + biases
            if PACKED:
                out = tl.where(valid, out, 0.0)
            at = y + (at_token + u) * D + columns
            tl.store(at, out.to(y.dtype.element_ty), mask=in_group)
            if SAVE:
                saved = statistics + (at_token + u) * STATISTICS * GROUPS + groups
                tl.store(saved, offset)
                tl.store(saved + GROUPS, rstd)
                if PACKED:
                    tl.store(saved + 2 * GROUPS, state[0])
    if SAVE:
        tl.store(pivots + at_split, state[0])
    if split == num_splits - 1:
        tl.store(final_mean + at_row, state[0] + state[1] / count)
        tl.store(final_var + at_row, state[2] / count)


@device_function
def load_statistics(
    statistics, at_token, groups, GROUPS: tl.constexpr, STATISTICS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Offsets and r of UNROLL successive tokens, and pivots if the row is packed."""
    saved = statistics + at_token * STATISTICS * GROUPS + groups
    pivots = ()
    if STATISTICS == 3:
        pivots = load_each(saved + 2 * GROUPS, STATISTICS * GROUPS, UNROLL)
    offsets = load_each(saved, STATISTICS * GROUPS, UNROLL)
    return offsets, load_each(saved + GROUPS, STATISTICS * GROUPS, UNROLL), pivots


@device_function
def load_gradient_tokens(
    x, dy, statistics, at_token, columns, groups, in_group,
    D: tl.constexpr, GROUPS: tl.constexpr, STATISTICS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """x, dy, offsets, r and pivots of UNROLL successive tokens."""
    xs = load_tokens(x, at_token * D + columns, in_group, D, UNROLL)
    dys = load_tokens(dy, at_token * D + columns, in_group, D, UNROLL)
    offsets, rstds, pivots = load_statistics(
        statistics, at_token, groups, GROUPS, STATISTICS, UNROLL
    )
    return xs, dys, offsets, rstds, pivots


@device_function
def token_slopes(g, centered, offset, rstd, count, in_group):
    """s and t of a token."""
    each = rstd / count
    products = tl.where(in_group, g * centered, 0.0)
    s = -0.5 * (rstd * rstd) * (tl.reduce(products, 1, add) * each)
    return s, -(each * tl.reduce(g, 1, add)) - 2.0 * (offset * s)


@triton.jit
def timestep_norm_slopes(
    x, dy, scale, statistics, pivots, initial_count, token_info, tiles, tiles_per_split, num_splits,
    slopes,
    GROUPS: tl.constexpr, GB: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr,
    FEATURES: tl.constexpr, D: tl.constexpr, FIRST_SPLIT: tl.constexpr, NUM_SLOPES: tl.constexpr,
    PACKED: tl.constexpr, STARTS_EMPTY: tl.constexpr, STATISTICS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Writes (B, J, G, 2): S and T over the tokens of a split that feed the splits before it."""
    groups, columns, in_group = find_block(GB, F, WIDTH, FEATURES)
    index = tl.program_id(1)
    row = tl.program_id(2)
    split = index + FIRST_SPLIT
    scales = tl.load(scale + columns, mask=in_group, other=0.0)
    split_pivot = tl.load(pivots + (row.to(tl.int64) * num_splits + split) * GROUPS + groups)
    s_sum = tl.full([GB], 0.0, tl.float32)
    t_sum = tl.full([GB], 0.0, tl.float32)
    count_before = 0
    if not (PACKED or STARTS_EMPTY):
        count_before = tl.load(initial_count + row)
    first, last, final = find_tokens(split, tiles, tiles_per_split, UNROLL)
    at_start = row.to(tl.int64) * tiles * TILE
    ahead = at_start + tl.minimum(first, final)
    following = load_gradient_tokens(
        x, dy, statistics, ahead, columns, groups, in_group, D, GROUPS, STATISTICS, UNROLL
    )
    for token in range(first, last, UNROLL):
        xs, dys, offsets, rstds, pivots_here = following
        ahead = at_start + tl.minimum(token + UNROLL, final)
        following = load_gradient_tokens(
            x, dy, statistics, ahead, columns, groups, in_group, D, GROUPS, STATISTICS, UNROLL
        )
        flags, counts = load_flags_and_counts(token_info, row, token, tiles, PACKED, UNROLL)
        for u in tl.static_range(UNROLL):
            offset = offsets[u]
            rstd = rstds[u]
            pivot = split_pivot
            if STATISTICS == 3:
                pivot = pivots_here[u]
            g = dys[u].to(tl.float32) * scales
            centered = (xs[u].to(tl.float32) - pivot[:, None]) - offset[:, None]
            if PACKED:
                wanted = VALID | FEEDS_PREVIOUS_SPLIT
                is_counted = (flags[u] & wanted) == wanted
                count = tl.maximum(counts[u].to(tl.float32), 1.0)
                s, t = token_slopes(g, centered, offset, rstd, count, in_group)
                s_sum += tl.where(is_counted, s, 0.0)
                t_sum += tl.where(is_counted, t, 0.0)
            else:
                count = (count_before + token + (u + 1)).to(tl.float32)
                s, t = token_slopes(g, centered, offset, rstd, count, in_group)
                s_sum += s
                t_sum += t
    out = slopes + ((row.to(tl.int64) * NUM_SLOPES + index) * GROUPS + groups) * 2
    tl.store(out, s_sum)
    tl.store(out + 1, t_sum)


@device_function
def end_documents(slopes, starts, flags):
    """Slopes before a token, and those of document starts with it if it starts one."""
    s, t = slopes
    is_start = (flags & DOCUMENT_START) != 0
    is_first = is_start & ((flags & LATER_DOCUMENT) == 0)
    is_later = is_start & ((flags & LATER_DOCUMENT) != 0)
    first_s, first_t, later_s, later_t = starts
    starts = (
        first_s + tl.where(is_first, s, 0.0),
        first_t + tl.where(is_first, t, 0.0),
        later_s + tl.where(is_later, s, 0.0),
        later_t + tl.where(is_later, t, 0.0),
    )
    return (tl.where(is_start, 0.0, s), tl.where(is_start, 0.0, t)), starts


@device_function
def store_starts(initial, at_split, slopes, starts, PACKED: tl.constexpr):
    """Slopes at document starts; at the split's first token in rows that are not packed."""
    if PACKED:
        tl.store(initial + at_split * 4, starts[0])
        tl.store(initial + at_split * 4 + 1, starts[1])
        tl.store(initial + at_split * 4 + 2, starts[2])
        tl.store(initial + at_split * 4 + 3, starts[3])
    else:
        tl.store(initial + at_split * 2, slopes[0])
        tl.store(initial + at_split * 2 + 1, slopes[1])


@triton.jit
def timestep_norm_gradients(
    x, dy, scale, statistics, pivots, next_slopes, initial_count, token_info, tiles,
    tiles_per_split, num_splits, dx, affine, initial,
    GROUPS: tl.constexpr, GB: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr,
    FEATURES: tl.constexpr, EACH: tl.constexpr, D: tl.constexpr, PACKED: tl.constexpr,
    STARTS_EMPTY: tl.constexpr, STATISTICS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dx of a split, its sums for scale and bias, and the slopes at document starts."""
    groups, columns, in_group = find_block(GB, F, WIDTH, FEATURES)
    split = tl.program_id(1)
    row = tl.program_id(2)
    scales = tl.load(scale + columns, mask=in_group, other=0.0)
    at_split = (row.to(tl.int64) * num_splits + split) * GROUPS + groups
    split_pivot = tl.load(pivots + at_split)
    slopes = (tl.load(next_slopes + at_split * 2), tl.load(next_slopes + at_split * 2 + 1))
    zero = tl.full([GB], 0.0, tl.float32)
    starts = (zero, zero, zero, zero)
    d_scale = tl.full([GB, F], 0.0, tl.float32)
    d_bias = tl.full([GB, F], 0.0, tl.float32)
    count_before = 0
    if not (PACKED or STARTS_EMPTY):
        count_before = tl.load(initial_count + row)
    first, last, final = find_tokens(split, tiles, tiles_per_split, UNROLL)
    at_start = row.to(tl.int64) * tiles * TILE
    ahead = at_start + final
    following = load_gradient_tokens(
        x, dy, statistics, ahead, columns, groups, in_group, D, GROUPS, STATISTICS, UNROLL
    )
    for i in range(0, (last - first) // UNROLL):
        token = last - (i + 1) * UNROLL
        at_token = at_start + token
        xs, dys, offsets, rstds, pivots_here = following
        ahead = at_start + tl.maximum(token - UNROLL, first)
        following = load_gradient_tokens(
            x, dy, statistics, ahead, columns, groups, in_group, D, GROUPS, STATISTICS, UNROLL
        )
        flags, counts = load_flags_and_counts(token_info, row, token, tiles, PACKED, UNROLL)
        for v in tl.static_range(UNROLL):
            offset = offsets[UNROLL - 1 - v]
            rstd = rstds[UNROLL - 1 - v]
            pivot = split_pivot
            if STATISTICS == 3:
                pivot = pivots_here[UNROLL - 1 - v]
            d_out = dys[UNROLL - 1 - v].to(tl.float32)
            from_pivot = xs[UNROLL - 1 - v].to(tl.float32) - pivot[:, None]
            centered = from_pivot - offset[:, None]
            count = 1.0
            if PACKED:
                count = tl.maximum(counts[UNROLL - 1 - v].to(tl.float32), 1.0)
                valid = (flags[UNROLL - 1 - v] & VALID) != 0
                d_out = tl.where(valid, d_out, 0.0)
                centered = tl.where(valid, centered, 0.0)
            else:
                count = (count_before + token + (UNROLL - v)).to(tl.float32)
            g = d_out * scales
            s, t = token_slopes(g, centered, offset, rstd, count, in_group)
            slopes = (slopes[0] + s, slopes[1] + t)
            value = g * rstd[:, None] + (
                (slopes[1] * EACH)[:, None] + from_pivot * (2.0 * EACH * slopes[0])[:, None]
            )
            if PACKED:
                value = tl.where(valid, value, 0.0)
                slopes, starts = end_documents(slopes, starts, flags[UNROLL - 1 - v])
            at = dx + (at_token + (UNROLL - 1 - v)) * D + columns
            tl.store(at, value.to(dx.dtype.element_ty), mask=in_group)
            d_scale += d_out * (centered * rstd[:, None])
            d_bias += d_out
    at_affine = affine + (row.to(tl.int64) * num_splits + split) * 2 * D + columns
    tl.store(at_affine, d_scale, mask=in_group)
    tl.store(at_affine + D, d_bias, mask=in_group)
    store_starts(initial, at_split, slopes, starts, PACKED)
