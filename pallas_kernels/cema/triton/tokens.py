"""Groups of UNROLL tokens in CEMA's Triton kernels: ordinary ones, and those with a boundary.

At a boundary a document starts, a token is padding, or a state is captured; such groups run token
by token, and padding is read as zero.
"""

import triton.language as tl

from pallas_kernels.cema.triton.recurrence import (
    CHANNELS,
    advance,
    load_complex,
    project,
    store_complex,
    zeros,
)
from pallas_kernels.common.triton import device_function


@device_function
def load_group(pointer, WIDTH: tl.constexpr, UNROLL: tl.constexpr):
    """UNROLL successive tokens, loaded before any arithmetic to overlap their latencies."""
    tokens = ()
    for i in tl.static_range(UNROLL):
        tokens = tokens + (tl.load(pointer + i * WIDTH).to(tl.float32),)  # noqa: RUF005
    return tokens


@device_function
def load_token(pointer, padding, position):
    """One token, zero if it is padding, and whether it is not."""
    is_token = ((padding >> position) & 1) == 0
    return tl.where(is_token, tl.load(pointer).to(tl.float32), 0.0), is_token


@device_function
def reset_state(
    initial, row_ends, row, token, channels,
    N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """The state where a document starts: the initial state for the row's first one, else zero."""
    real = zeros(P)
    imag = zeros(P)
    if HAS_INITIAL:
        if tl.load(row_ends + row * 2) == token:
            at = initial + row.to(tl.int64) * (2 * N * WIDTH)
            real, imag = load_complex(at, channels, N, P, WIDTH)
    return real, imag


@device_function
def summarize_group(
    real, imag, a, s, x, WIDTH: tl.constexpr, BACKWARD: tl.constexpr, UNROLL: tl.constexpr
):
    """The state after the UNROLL ordinary tokens at x; backward: before them."""
    tokens = load_group(x, WIDTH, UNROLL)
    for i in tl.static_range(UNROLL):
        if BACKWARD:
            real, imag = advance(real, imag, a, s, tokens[UNROLL - 1 - i])
        else:
            real, imag = advance(real, imag, a, s, tokens[i])
    return real, imag


@device_function
def summarize_tokens(
    real, imag, a, s, x, starts, padding, lowest, first_token, initial, row_ends, row, channels,
    N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr,
    BACKWARD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The state after UNROLL tokens with a boundary, `lowest` being their position in the tile."""
    for i in range(0, UNROLL):
        u = i
        if BACKWARD:
            u = UNROLL - 1 - i
        position = lowest + u
        is_start = ((starts >> position) & 1) != 0
        if not BACKWARD:
            if is_start:
                real, imag = reset_state(
                    initial, row_ends, row, first_token + u, channels, N, P, WIDTH, HAS_INITIAL
                )
        value, _ = load_token(x + u * WIDTH, padding, position)
        real, imag = advance(real, imag, a, s, value)
        if BACKWARD:
            if is_start:
                real = zeros(P)
                imag = zeros(P)
    return real, imag


@device_function
def write_group(real, imag, weights, x, y, WIDTH: tl.constexpr, UNROLL: tl.constexpr):
    """The state after the UNROLL ordinary tokens at x, whose outputs go to y."""
    a, s, c_real, c_imag, omega = weights
    tokens = load_group(x, WIDTH, UNROLL)
    for i in tl.static_range(UNROLL):
        real, imag = advance(real, imag, a, s, tokens[i])
        value = project(real, imag, c_real, c_imag, omega, tokens[i])
        tl.store(y + i * WIDTH, value.to(y.dtype.element_ty))
    return real, imag


@device_function
def write_tokens(
    real, imag, weights, x, y, starts, padding, capture, captured, lowest, first_token,
    initial, row_ends, row, channels,
    N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """The same for UNROLL tokens with a boundary; the state after `capture` goes to `captured`."""
    a, s, c_real, c_imag, omega = weights
    for u in range(0, UNROLL):
        position = lowest + u
        if ((starts >> position) & 1) != 0:
            real, imag = reset_state(
                initial, row_ends, row, first_token + u, channels, N, P, WIDTH, HAS_INITIAL
            )
        value, is_token = load_token(x + u * WIDTH, padding, position)
        real, imag = advance(real, imag, a, s, value)
        value = project(real, imag, c_real, c_imag, omega, value)
        tl.store(y + u * WIDTH, tl.where(is_token, value, 0.0).to(y.dtype.element_ty))
        if capture == position:
            store_complex(captured, channels, real, imag, N, P, WIDTH)
    return real, imag


@device_function
def zero_carry(real, imag, P: tl.constexpr):
    """The carry of the gradients before the first token: e, k, Σ x e, Σ x k, Σ x dy."""
    empty = (zeros(P), zeros(P))
    return (real, imag), empty, empty, empty, tl.full([CHANNELS], 0.0, tl.float32)


@device_function
def gradient_step(carry, weights, x, dy):
    """The carry after one more token backward in time, and its dx."""
    e, k, x_e, x_k, x_dy = carry
    a, s, c_real, c_imag, omega = weights
    k_real = a * k[0] + (e[0] - s * k[1])
    k_imag = a * k[1] + (e[1] + s * k[0])
    e_real, e_imag = advance(e[0], e[1], a, s, dy)
    dx = project(e_real, e_imag, c_real, c_imag, omega, dy)
    x_e = (x_e[0] + x[None, :] * e_real, x_e[1] + x[None, :] * e_imag)
    x_k = (x_k[0] + x[None, :] * k_real, x_k[1] + x[None, :] * k_imag)
    return ((e_real, e_imag), (k_real, k_imag), x_e, x_k, x_dy + x * dy), dx


@device_function
def gradient_group(carry, weights, x, dy, dx, WIDTH: tl.constexpr, UNROLL: tl.constexpr):
    """The carry before the UNROLL ordinary tokens at x, whose gradients go to dx."""
    xs = load_group(x, WIDTH, UNROLL)
    dys = load_group(dy, WIDTH, UNROLL)
    for i in tl.static_range(UNROLL):
        # Not a variable: Triton would make it a tensor, which cannot index a tuple.
        carry, value = gradient_step(carry, weights, xs[UNROLL - 1 - i], dys[UNROLL - 1 - i])
        tl.store(dx + (UNROLL - 1 - i) * WIDTH, value.to(dx.dtype.element_ty))
    return carry


@device_function
def gradient_tokens(
    carry, weights, x, dy, dx, starts, padding, capture, first_e, first_k, lowest, channels,
    N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The same for UNROLL tokens with a boundary; `capture` is the row's first token."""
    for i in range(0, UNROLL):
        u = UNROLL - 1 - i
        position = lowest + u
        x_value, is_token = load_token(x + u * WIDTH, padding, position)
        dy_value, _ = load_token(dy + u * WIDTH, padding, position)
        carry, value = gradient_step(carry, weights, x_value, dy_value)
        e, k, x_e, x_k, x_dy = carry
        tl.store(dx + u * WIDTH, tl.where(is_token, value, 0.0).to(dx.dtype.element_ty))
        if capture == position:
            store_complex(first_e, channels, e[0], e[1], N, P, WIDTH)
            store_complex(first_k, channels, k[0], k[1], N, P, WIDTH)
        if ((starts >> position) & 1) != 0:
            e = (zeros(P), zeros(P))
            k = (zeros(P), zeros(P))
        carry = (e, k, x_e, x_k, x_dy)
    return carry


@device_function
def add_previous_state(x_k, a, s, h_real, h_imag, k):
    """x_k + q h k; where k is zero, x_k alone even if h is not finite."""
    qh_real = a * h_real - s * h_imag
    qh_imag = a * h_imag + s * h_real
    is_zero = (k[0] == 0) & (k[1] == 0)
    real = x_k[0] + tl.where(is_zero, 0.0, qh_real * k[0] - qh_imag * k[1])
    return real, x_k[1] + tl.where(is_zero, 0.0, qh_real * k[1] + qh_imag * k[0])
