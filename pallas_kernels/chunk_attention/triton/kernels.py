"""Chunk attention's Triton kernels: attention of queries to intervals of keys.

Query t sees the keys start[t] .. stop[t] - 1 of its row. Both grow along the row, so a tile of
queries sees one run of keys, and a tile of keys is seen by one run of queries. Nothing is read
outside of these runs, and no array has the size of the scores.

`forward` is an online softmax. Backward the weights P = exp(S - lse) are computed again:

    dV = Pᵀ dO      dS = P * (dO Vᵀ - rowsum(dO * O))      dQ = dS K      dK = dSᵀ Q

with a program for each tile of keys (dK, dV) or of queries (dQ), so that no two programs add to the
same number.

Sums of wide values do not fit into registers: O and dV are cut into blocks of V columns, whose
programs compute the scores again, Dk + V multiply-adds for a pair of tokens and a block. With
Dk = 256, Dv = 2048 and V = 512 that is 256 (lse) + 4 * 768 forward, where 2304 are the least, and
4 * 768 (dV) + 2 * 2560 (dK, dQ: scores, dO Vᵀ, product) backward, where 4864 are. A pair of tokens
takes 8 + 96 bytes from the L2 cache forward, 96 + 2 * 152 backward. README.md has the alternatives.
"""

import triton
import triton.language as tl
from triton.language.standard import _elementwise_max as larger
from triton.language.standard import _elementwise_min as smaller
from triton.language.standard import _sum_combine as add

from pallas_kernels.chunk_attention.triton.tiles import (
    find_head,
    find_tile,
    load_numbers,
    load_tile,
    multiply,
    multiply_heads,
    round_as,
    store_tile,
)

# Finite: the difference of two infinities is NaN.
MASKED_SCORE: tl.constexpr = tl.constexpr(-1e38)


@triton.jit
def chunk_attention_forward(
    q, k, v, start, stop, num_queries, num_keys, out, lse, HEADS: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, KEY_BLOCK: tl.constexpr, KEY_SLICE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    IS_NARROW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """lse of QUERIES queries; if IS_NARROW, VALUE_BLOCK holds all columns, and the output too."""
    row, head, tile = find_tile(num_queries, QUERIES, HEADS)
    query = tile * QUERIES
    q = find_head(q, row, head, num_queries, HEADS, DK)
    k = find_head(k, row, head, num_keys, HEADS, DK)
    starts = load_numbers(start + row * num_queries, query, num_queries, QUERIES)
    stops = load_numbers(stop + row * num_queries, query, num_queries, QUERIES)
    first = tl.reduce(tl.where(starts < stops, starts, num_keys), 0, smaller)
    end = tl.reduce(tl.where(starts < stops, stops, 0), 0, larger)
    if KEY_SLICE == KEY_BLOCK:
        q_tile = load_tile(q, query, num_queries, 0, HEADS * DK, DK, QUERIES, KEY_BLOCK)
    m_i = tl.full([QUERIES], MASKED_SCORE, tl.float32)
    l_i = tl.full([QUERIES], 0.0, tl.float32)
    if IS_NARROW:
        v = find_head(v, row, head, num_keys, HEADS, DV)
        acc = tl.full([QUERIES, VALUE_BLOCK], 0.0, tl.float32)
    for key in range(first, end, KEYS):
        if KEY_SLICE == KEY_BLOCK:
            k_tile = load_tile(k, key, num_keys, 0, HEADS * DK, DK, KEYS, KEY_BLOCK)
            zeros = tl.full([QUERIES, KEYS], 0.0, tl.float32)
            scores = multiply(q_tile, tl.trans(k_tile), zeros)
        else:
            scores = multiply_heads(
                q, k, query, key, num_queries, num_keys, HEADS * DK, DK, QUERIES, KEYS, KEY_SLICE
            )
        keys = key + tl.arange(0, KEYS)
        allowed = (keys[None, :] >= starts[:, None]) & (keys[None, :] < stops[:, None])
        scores = tl.where(allowed, scores, MASKED_SCORE)
        highest = tl.maximum(m_i, tl.reduce(scores, 1, larger))
        rescale = tl.exp(m_i - highest)
        # exp(masked - masked) is 1 for a query that has seen no key yet.
        weights = tl.where(allowed, tl.exp(scores - highest[:, None]), 0.0)
        l_i = l_i * rescale + tl.reduce(weights, 1, add)
        m_i = highest
        if IS_NARROW:
            v_tile = load_tile(v, key, num_keys, 0, HEADS * DV, DV, KEYS, VALUE_BLOCK)
            acc = multiply(round_as(weights, v_tile), v_tile, acc * rescale[:, None])
    has_keys = l_i > 0.0
    divisor = tl.where(has_keys, l_i, 1.0)
    queries = query + tl.arange(0, QUERIES)
    at = lse + (row * HEADS + head) * num_queries + queries
    tl.store(at, tl.where(has_keys, m_i + tl.log(divisor), 0.0), mask=queries < num_queries)
    if IS_NARROW:
        out = find_head(out, row, head, num_queries, HEADS, DV)
        acc = acc / divisor[:, None]
        store_tile(out, acc, query, num_queries, 0, HEADS * DV, DV, QUERIES, VALUE_BLOCK)


@triton.jit
def chunk_attention_output(
    q, k, v, lse, start, stop, num_queries, num_keys, out, HEADS: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, KEY_BLOCK: tl.constexpr, KEY_SLICE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """VALUE_BLOCK columns of the output of QUERIES queries, where a value has several blocks."""
    row, head, tile = find_tile(num_queries, QUERIES, HEADS)
    query = tile * QUERIES
    column = tl.program_id(1) * VALUE_BLOCK
    q = find_head(q, row, head, num_queries, HEADS, DK)
    k = find_head(k, row, head, num_keys, HEADS, DK)
    v = find_head(v, row, head, num_keys, HEADS, DV)
    out = find_head(out, row, head, num_queries, HEADS, DV)
    starts = load_numbers(start + row * num_queries, query, num_queries, QUERIES)
    stops = load_numbers(stop + row * num_queries, query, num_queries, QUERIES)
    lse_i = load_numbers(lse + (row * HEADS + head) * num_queries, query, num_queries, QUERIES)
    first = tl.reduce(tl.where(starts < stops, starts, num_keys), 0, smaller)
    end = tl.reduce(tl.where(starts < stops, stops, 0), 0, larger)
    if KEY_SLICE == KEY_BLOCK:
        q_tile = load_tile(q, query, num_queries, 0, HEADS * DK, DK, QUERIES, KEY_BLOCK)
    acc = tl.full([QUERIES, VALUE_BLOCK], 0.0, tl.float32)
    for key in range(first, end, KEYS):
        if KEY_SLICE == KEY_BLOCK:
            k_tile = load_tile(k, key, num_keys, 0, HEADS * DK, DK, KEYS, KEY_BLOCK)
        v_tile = load_tile(v, key, num_keys, column, HEADS * DV, DV, KEYS, VALUE_BLOCK)
        if KEY_SLICE == KEY_BLOCK:
            zeros = tl.full([QUERIES, KEYS], 0.0, tl.float32)
            scores = multiply(q_tile, tl.trans(k_tile), zeros)
        else:
            scores = multiply_heads(
                q, k, query, key, num_queries, num_keys, HEADS * DK, DK, QUERIES, KEYS, KEY_SLICE
            )
        keys = key + tl.arange(0, KEYS)
        allowed = (keys[None, :] >= starts[:, None]) & (keys[None, :] < stops[:, None])
        weights = tl.where(allowed, tl.exp(scores - lse_i[:, None]), 0.0)
        acc = multiply(round_as(weights, v_tile), v_tile, acc)
    store_tile(out, acc, query, num_queries, column, HEADS * DV, DV, QUERIES, VALUE_BLOCK)


@triton.jit
def chunk_attention_query_gradient(
    q, k, v, do, lse, delta, start, stop, num_queries, num_keys, dq, HEADS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    IS_NARROW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dQ of QUERIES queries; if IS_NARROW, VALUE_BLOCK holds all columns of a value."""
    row, head, tile = find_tile(num_queries, QUERIES, HEADS)
    query = tile * QUERIES
    q = find_head(q, row, head, num_queries, HEADS, DK)
    k = find_head(k, row, head, num_keys, HEADS, DK)
    v = find_head(v, row, head, num_keys, HEADS, DV)
    do = find_head(do, row, head, num_queries, HEADS, DV)
    dq = find_head(dq, row, head, num_queries, HEADS, DK)
    starts = load_numbers(start + row * num_queries, query, num_queries, QUERIES)
    stops = load_numbers(stop + row * num_queries, query, num_queries, QUERIES)
    first = tl.reduce(tl.where(starts < stops, starts, num_keys), 0, smaller)
    end = tl.reduce(tl.where(starts < stops, stops, 0), 0, larger)
    of_head = (row * HEADS + head) * num_queries
    lse_i = load_numbers(lse + of_head, query, num_queries, QUERIES)
    delta_i = load_numbers(delta + of_head, query, num_queries, QUERIES)
    if IS_NARROW:
        q_tile = load_tile(q, query, num_queries, 0, HEADS * DK, DK, QUERIES, KEY_BLOCK)
        do_tile = load_tile(do, query, num_queries, 0, HEADS * DV, DV, QUERIES, VALUE_BLOCK)
    acc = tl.full([QUERIES, KEY_BLOCK], 0.0, tl.float32)
    for key in range(first, end, KEYS):
        zeros = tl.full([QUERIES, KEYS], 0.0, tl.float32)
        if IS_NARROW:
            k_tile = load_tile(k, key, num_keys, 0, HEADS * DK, DK, KEYS, KEY_BLOCK)
            v_tile = load_tile(v, key, num_keys, 0, HEADS * DV, DV, KEYS, VALUE_BLOCK)
            d_weights = multiply(do_tile, tl.trans(v_tile), zeros)
            scores = multiply(q_tile, tl.trans(k_tile), zeros)
        else:
            d_weights = multiply_heads(
                do, v, query, key, num_queries, num_keys, HEADS * DV, DV, QUERIES, KEYS,
                VALUE_BLOCK,
            )  # fmt: skip
            scores = multiply_heads(
                q, k, query, key, num_queries, num_keys, HEADS * DK, DK, QUERIES, KEYS,
                VALUE_BLOCK,
            )  # fmt: skip
        keys = key + tl.arange(0, KEYS)
        allowed = (keys[None, :] >= starts[:, None]) & (keys[None, :] < stops[:, None])
        weights = tl.exp(scores - lse_i[:, None])
        # Products with another document may be infinite, and 0 times infinity is NaN.
        d_scores = tl.where(allowed, weights * (d_weights - delta_i[:, None]), 0.0)
        if not IS_NARROW:
            k_tile = load_tile(k, key, num_keys, 0, HEADS * DK, DK, KEYS, KEY_BLOCK)
        acc = multiply(round_as(d_scores, k_tile), k_tile, acc)
    store_tile(dq, acc, query, num_queries, 0, HEADS * DK, DK, QUERIES, KEY_BLOCK)


@triton.jit
def chunk_attention_key_gradient(
    q, k, v, do, lse, delta, start, stop, first_query, end_query, num_queries, num_keys, dk, dv,
    HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, IS_NARROW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dK of KEYS keys; if IS_NARROW, VALUE_BLOCK holds all columns of a value, and dV too."""
    row, head, tile = find_tile(num_keys, KEYS, HEADS)
    key = tile * KEYS
    at = row * ((num_keys + KEYS - 1) // KEYS) + tile
    first, end = tl.load(first_query + at), tl.load(end_query + at)
    q = find_head(q, row, head, num_queries, HEADS, DK)
    k = find_head(k, row, head, num_keys, HEADS, DK)
    v = find_head(v, row, head, num_keys, HEADS, DV)
    do = find_head(do, row, head, num_queries, HEADS, DV)
    dk = find_head(dk, row, head, num_keys, HEADS, DK)
    of_head = (row * HEADS + head) * num_queries
    keys = key + tl.arange(0, KEYS)
    if IS_NARROW:
        k_tile = load_tile(k, key, num_keys, 0, HEADS * DK, DK, KEYS, KEY_BLOCK)
        v_tile = load_tile(v, key, num_keys, 0, HEADS * DV, DV, KEYS, VALUE_BLOCK)
        dv_acc = tl.full([KEYS, VALUE_BLOCK], 0.0, tl.float32)
    dk_acc = tl.full([KEYS, KEY_BLOCK], 0.0, tl.float32)
    for query in range(first, end, QUERIES):
        starts = load_numbers(start + row * num_queries, query, num_queries, QUERIES)
        stops = load_numbers(stop + row * num_queries, query, num_queries, QUERIES)
        lse_i = load_numbers(lse + of_head, query, num_queries, QUERIES)
        delta_i = load_numbers(delta + of_head, query, num_queries, QUERIES)
        allowed = (keys[:, None] >= starts[None, :]) & (keys[:, None] < stops[None, :])
        # Keys by queries: no product needs a transposed matrix of weights.
        zeros = tl.full([KEYS, QUERIES], 0.0, tl.float32)
        if IS_NARROW:
            q_tile = load_tile(q, query, num_queries, 0, HEADS * DK, DK, QUERIES, KEY_BLOCK)
            do_tile = load_tile(do, query, num_queries, 0, HEADS * DV, DV, QUERIES, VALUE_BLOCK)
            d_weights = multiply(v_tile, tl.trans(do_tile), zeros)
            scores = multiply(k_tile, tl.trans(q_tile), zeros)
        else:
            d_weights = multiply_heads(
                v, do, key, query, num_keys, num_queries, HEADS * DV, DV, KEYS, QUERIES,
                VALUE_BLOCK,
            )  # fmt: skip
            scores = multiply_heads(
                k, q, key, query, num_keys, num_queries, HEADS * DK, DK, KEYS, QUERIES,
                VALUE_BLOCK,
            )  # fmt: skip
        weights = tl.where(allowed, tl.exp(scores - lse_i[None, :]), 0.0)
        if IS_NARROW:
            dv_acc = multiply(round_as(weights, do_tile), do_tile, dv_acc)
        # Products with another document may be infinite, and 0 times infinity is NaN.
        d_scores = tl.where(allowed, weights * (d_weights - delta_i[None, :]), 0.0)
        if not IS_NARROW:
            q_tile = load_tile(q, query, num_queries, 0, HEADS * DK, DK, QUERIES, KEY_BLOCK)
        dk_acc = multiply(round_as(d_scores, q_tile), q_tile, dk_acc)
    store_tile(dk, dk_acc, key, num_keys, 0, HEADS * DK, DK, KEYS, KEY_BLOCK)
    if IS_NARROW:
        dv = find_head(dv, row, head, num_keys, HEADS, DV)
        store_tile(dv, dv_acc, key, num_keys, 0, HEADS * DV, DV, KEYS, VALUE_BLOCK)


@triton.jit
def chunk_attention_value_gradient(
    q, k, do, lse, start, stop, first_query, end_query, num_queries, num_keys, dv,
    HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KEY_BLOCK: tl.constexpr,
    KEY_SLICE: tl.constexpr, VALUE_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """VALUE_BLOCK columns of dV of KEYS keys, where a value has more than one block of columns."""
    row, head, tile = find_tile(num_keys, KEYS, HEADS)
    key = tile * KEYS
    column = tl.program_id(1) * VALUE_BLOCK
    at = row * ((num_keys + KEYS - 1) // KEYS) + tile
    first, end = tl.load(first_query + at), tl.load(end_query + at)
    q = find_head(q, row, head, num_queries, HEADS, DK)
    k = find_head(k, row, head, num_keys, HEADS, DK)
    do = find_head(do, row, head, num_queries, HEADS, DV)
    dv = find_head(dv, row, head, num_keys, HEADS, DV)
    of_head = (row * HEADS + head) * num_queries
    keys = key + tl.arange(0, KEYS)
    if KEY_SLICE == KEY_BLOCK:
        k_tile = load_tile(k, key, num_keys, 0, HEADS * DK, DK, KEYS, KEY_BLOCK)
    acc = tl.full([KEYS, VALUE_BLOCK], 0.0, tl.float32)
    for query in range(first, end, QUERIES):
        if KEY_SLICE == KEY_BLOCK:
            q_tile = load_tile(q, query, num_queries, 0, HEADS * DK, DK, QUERIES, KEY_BLOCK)
        do_tile = load_tile(do, query, num_queries, column, HEADS * DV, DV, QUERIES, VALUE_BLOCK)
        starts = load_numbers(start + row * num_queries, query, num_queries, QUERIES)
        stops = load_numbers(stop + row * num_queries, query, num_queries, QUERIES)
        lse_i = load_numbers(lse + of_head, query, num_queries, QUERIES)
        allowed = (keys[:, None] >= starts[None, :]) & (keys[:, None] < stops[None, :])
        if KEY_SLICE == KEY_BLOCK:
            zeros = tl.full([KEYS, QUERIES], 0.0, tl.float32)
            scores = multiply(k_tile, tl.trans(q_tile), zeros)
        else:
            scores = multiply_heads(
                k, q, key, query, num_keys, num_queries, HEADS * DK, DK, KEYS, QUERIES, KEY_SLICE
            )
        weights = tl.where(allowed, tl.exp(scores - lse_i[None, :]), 0.0)
        acc = multiply(round_as(weights, do_tile), do_tile, acc)
    store_tile(dv, acc, key, num_keys, column, HEADS * DV, DV, KEYS, VALUE_BLOCK)
