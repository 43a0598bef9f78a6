"""The recurrence of CEMA in registers, in Triton: what the kernels of `kernels.py` share.

A value (P, CHANNELS) of four warps has every order of a channel in one thread: P is the orders
padded to a power of two, channels are along the threads. Sums over orders then need no
communication. Triton would choose another layout if it knew that the first channel is aligned: it
would load four of them per thread, and compute like that (`find_channels`).
"""

import triton.language as tl
from triton.language.standard import _sum_combine as add

from pallas_kernels.common.triton import device_function

CHANNELS = tl.constexpr(128)
TILE = tl.constexpr(32)
# 64 ln 2 / TILE: the states of so many tiles / (1 - |q|) before have decayed below 2^-64.
HORIZON = tl.constexpr(1.3862943611198906)
SMALLEST_DAMPING = tl.constexpr(2.0**-24)


@device_function
def zeros(P: tl.constexpr):
    """Zero in every order."""
    return tl.full([P, CHANNELS], 0.0, tl.float32)


@device_function
def find_channels():
    """The channels of this block, in a form that hides from Triton that the first is aligned."""
    block = tl.program_id(0)
    # The shift gives 0, which the last stage of the compiler knows, but not the earlier ones.
    first = block * CHANNELS + (block >> 31)
    return first + tl.arange(0, CHANNELS)


@device_function
def load_orders(pointer, channels, N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr):
    """(N, D) in memory to (P, CHANNELS); orders from N on are zero."""
    order = tl.arange(0, P)[:, None]
    return tl.load(pointer + order * WIDTH + channels[None, :], mask=order < N, other=0.0)


@device_function
def store_orders(pointer, channels, values, N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_orders`."""
    order = tl.arange(0, P)[:, None]
    tl.store(pointer + order * WIDTH + channels[None, :], values, mask=order < N)


@device_function
def load_complex(pointer, channels, N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr):
    """Real and imaginary parts from (2, N, D)."""
    real = load_orders(pointer, channels, N, P, WIDTH)
    return real, load_orders(pointer + N * WIDTH, channels, N, P, WIDTH)


@device_function
def store_complex(
    pointer, channels, real, imag, N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr
):
    """The inverse of `load_complex`."""
    store_orders(pointer, channels, real, N, P, WIDTH)
    store_orders(pointer + N * WIDTH, channels, imag, N, P, WIDTH)


@device_function
def load_weights(
    coefficients, omega, channels, N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr
):
    """Re q, Im q, Re c, Im c and omega."""
    a, s = load_complex(coefficients, channels, N, P, WIDTH)
    c_real, c_imag = load_complex(coefficients + 2 * N * WIDTH, channels, N, P, WIDTH)
    return a, s, c_real, c_imag, tl.load(omega + channels)


@device_function
def advance(real, imag, a, s, x):
    """q h + x for q = a + i s and real x (CHANNELS)."""
    return a * real + (x[None, :] - s * imag), a * imag + s * real


@device_function
def project(real, imag, c_real, c_imag, omega, x):
    """Re Σ_n c h + omega x."""
    return tl.reduce(c_real * real, 0, add) - tl.reduce(c_imag * imag, 0, add) + omega * x


@device_function
def load_boundaries(boundary_bits, row, tile, tiles):
    """Bits of a tile: tokens that start a document, padding tokens."""
    at = boundary_bits + (row.to(tl.int64) * tiles + tile) * 2
    return tl.load(at), tl.load(at + 1)


@device_function
def find_capture(row_ends, row, tile, END: tl.constexpr):
    """Position in the tile of the row's first (END 0) or last (END 1) token, else -1."""
    offset = tl.load(row_ends + row * 2 + END) - tile * TILE
    return tl.where((offset >= 0) & (offset < TILE), offset, -1)


@device_function
def is_plain(starts, padding, capture, lowest, UNROLL: tl.constexpr):
    """Whether the UNROLL tokens from `lowest` on are ordinary ones."""
    bits = ((starts | padding) >> lowest) & ((1 << UNROLL) - 1)
    return (bits == 0) & ((capture < lowest) | (capture >= lowest + UNROLL))


@device_function
def find_horizon(damping, channel_block):
    """Tiles after which less than 2^-64 of any state is left: |q|^t <= exp(-(1 - |q|) t)."""
    least = tl.maximum(tl.load(damping + channel_block), SMALLEST_DAMPING)
    return (1.0 / least * HORIZON).to(tl.int32) + 1


@device_function
def fold_summaries(
    real, imag, coefficients, damping, summaries, num_summaries, passes_state_through,
    row, split, num_splits, tiles_per_split, channels,
    N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
    PACKED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The state before a split, from that before the row; backward from e after the row."""
    power_real, power_imag = load_complex(coefficients + 4 * N * WIDTH, channels, N, P, WIDTH)
    count = split
    if BACKWARD:
        count = num_splits - 1 - split
    # Splits beyond the horizon are skipped, and then also the state before the row.
    horizon = find_horizon(damping, tl.program_id(0)) // tiles_per_split + 1
    skipped = tl.maximum(count - horizon, 0)
    if skipped > 0:
        real = zeros(P)
        imag = zeros(P)
    for i in range(skipped, count):
        index = i
        crossed = i
        if BACKWARD:
            index = num_splits - 2 - i
            crossed = index + 1
        if PACKED:
            if tl.load(passes_state_through + row * num_splits + crossed) == 0:
                real = zeros(P)
                imag = zeros(P)
        at = summaries + (row.to(tl.int64) * num_summaries + index) * (2 * N * WIDTH)
        added_real, added_imag = load_complex(at, channels, N, P, WIDTH)
        new_real = added_real + (power_real * real - power_imag * imag)
        imag = added_imag + (power_real * imag + power_imag * real)
        real = new_real
    return real, imag
