"""CEMA's Triton kernels: rows split in time, the state of a channel in the registers of a thread.

The grid is (blocks of 128 channels, splits of a row, rows). `cema_summaries` finds the state that
every split adds, `cema_outputs` folds those of the splits before its own and writes y. Backward the
same system, driven by dy, gives the adjoint state e; `cema_gradients` has, with k = ∂e/∂q,

    k[t] = q k[t+1] + e[t+1]      e[t] = q e[t+1] + dy[t]      dx = Re Σ_n c e + omega dy
    ∂/∂c = Σ x e                  ∂/∂q = c (Σ x k + q h k)

where every split starts from k = 0 and adds, for its first token, the state h before the split.
"""

import triton
import triton.language as tl

from pallas_kernels.cema.triton.recurrence import (
    TILE,
    find_capture,
    find_channels,
    find_horizon,
    fold_summaries,
    is_plain,
    load_boundaries,
    load_complex,
    load_weights,
    store_complex,
    zeros,
)
from pallas_kernels.cema.triton.tokens import (
    add_previous_state,
    gradient_group,
    gradient_tokens,
    summarize_group,
    summarize_tokens,
    write_group,
    write_tokens,
    zero_carry,
)


@triton.jit
def cema_summaries(
    x, coefficients, damping, boundary_bits, row_ends, initial, tiles, tiles_per_split, summaries,
    N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, FIRST_SPLIT: tl.constexpr,
    NUM_SUMMARIES: tl.constexpr, PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr,
    BACKWARD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The state that a split's own tokens add: after it, or before it if BACKWARD (x is dy)."""
    channels = find_channels()
    index = tl.program_id(1)
    row = tl.program_id(2)
    a, s = load_complex(coefficients, channels, N, P, WIDTH)
    first = (index + FIRST_SPLIT) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    # Tokens beyond the horizon leave nothing of themselves at the split's end.
    near = tl.minimum(last - first, find_horizon(damping, tl.program_id(0)))
    real = zeros(P)
    imag = zeros(P)
    groups = near * (TILE // UNROLL)
    for i in range(0, groups):
        token = last * TILE - (groups - i) * UNROLL
        if BACKWARD:
            token = first * TILE + (groups - 1 - i) * UNROLL
        at = x + (row.to(tl.int64) * tiles * TILE + token) * WIDTH + channels
        if PACKED:
            starts, padding = load_boundaries(boundary_bits, row, token // TILE, tiles)
            lowest = token - token // TILE * TILE
            if is_plain(starts, padding, -1, lowest, UNROLL):
                real, imag = summarize_group(real, imag, a, s, at, WIDTH, BACKWARD, UNROLL)
            else:
                real, imag = summarize_tokens(
                    real, imag, a, s, at, starts, padding, lowest, token, initial, row_ends, row,
                    channels, N, P, WIDTH, HAS_INITIAL, BACKWARD, UNROLL,
                )  # fmt: skip
        else:
            real, imag = summarize_group(real, imag, a, s, at, WIDTH, BACKWARD, UNROLL)
    out = summaries + (row.to(tl.int64) * NUM_SUMMARIES + index) * (2 * N * WIDTH)
    store_complex(out, channels, real, imag, N, P, WIDTH)


@triton.jit
def cema_outputs(
    x, coefficients, omega, damping, boundary_bits, row_ends, passes_state_through, initial,
    summaries, tiles, tiles_per_split, num_splits, num_summaries, y, final_state, previous_states,
    N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
    HAS_INITIAL: tl.constexpr, SAVE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y of a split, the state before it if SAVE, and the row's final state."""
    channels = find_channels()
    split = tl.program_id(1)
    row = tl.program_id(2)
    state = row.to(tl.int64) * (2 * N * WIDTH)
    real = zeros(P)
    imag = zeros(P)
    if HAS_INITIAL:
        real, imag = load_complex(initial + state, channels, N, P, WIDTH)
    real, imag = fold_summaries(
        real, imag, coefficients, damping, summaries, num_summaries, passes_state_through, row,
        split, num_splits, tiles_per_split, channels, N, P, WIDTH, PACKED, False,
    )  # fmt: skip
    if SAVE:
        out = previous_states + (row.to(tl.int64) * num_splits + split) * (2 * N * WIDTH)
        store_complex(out, channels, real, imag, N, P, WIDTH)
    weights = load_weights(coefficients, omega, channels, N, P, WIDTH)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    for token in range(first * TILE, last * TILE, UNROLL):
        offset = (row.to(tl.int64) * tiles * TILE + token) * WIDTH + channels
        if PACKED:
            starts, padding = load_boundaries(boundary_bits, row, token // TILE, tiles)
            capture = find_capture(row_ends, row, token // TILE, 1)
            lowest = token - token // TILE * TILE
            if is_plain(starts, padding, capture, lowest, UNROLL):
                real, imag = write_group(real, imag, weights, x + offset, y + offset, WIDTH, UNROLL)
            else:
                real, imag = write_tokens(
                    real, imag, weights, x + offset, y + offset, starts, padding, capture,
                    final_state + state, lowest, token, initial, row_ends, row, channels,
                    N, P, WIDTH, HAS_INITIAL, UNROLL,
                )  # fmt: skip
        else:
            real, imag = write_group(real, imag, weights, x + offset, y + offset, WIDTH, UNROLL)
    if not PACKED:
        if split == num_splits - 1:
            store_complex(final_state + state, channels, real, imag, N, P, WIDTH)


@triton.jit
def cema_gradients(
    x, dy, coefficients, omega, damping, boundary_bits, row_ends, passes_state_through, initial,
    summaries, previous_states, tiles, tiles_per_split, num_splits, num_summaries,
    dx, x_e_sums, x_k_sums, x_dy_sums, first_e, first_k,
    N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
    HAS_INITIAL: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dx of a split, and its sums for the gradients of the parameters."""
    channels = find_channels()
    split = tl.program_id(1)
    row = tl.program_id(2)
    state = row.to(tl.int64) * (2 * N * WIDTH)
    real, imag = fold_summaries(
        zeros(P), zeros(P), coefficients, damping, summaries, num_summaries, passes_state_through,
        row, split, num_splits, tiles_per_split, channels, N, P, WIDTH, PACKED, True,
    )  # fmt: skip
    if HAS_INITIAL:
        if split == num_splits - 1:
            real, imag = load_complex(initial + state, channels, N, P, WIDTH)
    weights = load_weights(coefficients, omega, channels, N, P, WIDTH)
    carry = zero_carry(real, imag, P)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    for i in range(0, (last - first) * (TILE // UNROLL)):
        token = last * TILE - (i + 1) * UNROLL
        offset = (row.to(tl.int64) * tiles * TILE + token) * WIDTH + channels
        if PACKED:
            starts, padding = load_boundaries(boundary_bits, row, token // TILE, tiles)
            capture = find_capture(row_ends, row, token // TILE, 0)
            lowest = token - token // TILE * TILE
            if is_plain(starts, padding, capture, lowest, UNROLL):
                carry = gradient_group(
                    carry, weights, x + offset, dy + offset, dx + offset, WIDTH, UNROLL
                )
            else:
                carry = gradient_tokens(
                    carry, weights, x + offset, dy + offset, dx + offset, starts, padding, capture,
                    first_e + state, first_k + state, lowest, channels, N, P, WIDTH, UNROLL,
                )  # fmt: skip
        else:
            carry = gradient_group(
                carry, weights, x + offset, dy + offset, dx + offset, WIDTH, UNROLL
            )
    e, k, x_e, x_k, x_dy = carry
    if not PACKED:
        if split == 0:
            store_complex(first_e + state, channels, e[0], e[1], N, P, WIDTH)
            store_complex(first_k + state, channels, k[0], k[1], N, P, WIDTH)
    index = row.to(tl.int64) * num_splits + split
    at = index * (2 * N * WIDTH)
    h_real, h_imag = load_complex(previous_states + at, channels, N, P, WIDTH)
    k_real, k_imag = add_previous_state(x_k, weights[0], weights[1], h_real, h_imag, k)
    store_complex(x_e_sums + at, channels, x_e[0], x_e[1], N, P, WIDTH)
    store_complex(x_k_sums + at, channels, k_real, k_imag, N, P, WIDTH)
    tl.store(x_dy_sums + index * WIDTH + channels, x_dy)
