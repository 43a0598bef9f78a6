"""The recurrence of CEMA in registers, one channel a thread; `mosaic_gpu_kernels` has the algebra.

A pair is the state (u, w) of every order, h = u + i s w.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.cema.mosaic_gpu import pipeline as streams
from pallas_kernels.cema.mosaic_gpu.pipeline import Lanes

# The least |Im q| in w = Im h / Im q; a smaller one changes y by less than 2^-40 of its terms.
SMALLEST_TURN = 2.0**-40


class System(NamedTuple):
    """Coefficients of M = [[a, -s²], [1, a]] in registers, a Lanes for every order."""

    a: tuple[Lanes, ...]
    minus_s2: tuple[Lanes, ...]


class TwoSteps(NamedTuple):
    """Coefficients of two tokens at once: a, and M² = [[diagonal, upper], [lower, diagonal]]."""

    a: tuple[Lanes, ...]
    diagonal: tuple[Lanes, ...]
    upper: tuple[Lanes, ...]
    lower: tuple[Lanes, ...]


class Readers(NamedTuple):
    """How y of two tokens is read from the state before: c M, c M²; and from the tokens."""

    first: tuple
    second: tuple
    taps: tuple[Lanes, Lanes]


def load_turns(tables: Any, order: int, channels: Any) -> tuple[Lanes, ...]:
    """s of every order. Loaded wherever it is needed: it would hold registers through the loop."""
    turns = []
    for s in streams.load_rows(tables.rows.at[1], order, channels):
        least = jnp.full_like(s, SMALLEST_TURN)
        turns.append(jnp.where(jnp.abs(s) < least, jnp.where(s < 0, -least, least), s))
    return tuple(turns)


def load_system(tables: Any, order: int, channels: Any) -> System:
    """Coefficients of the recurrence."""
    turns = load_turns(tables, order, channels)
    a = streams.load_rows(tables.rows.at[0], order, channels)
    return System(a, tuple(-(s * s) for s in turns))


def square(system: System) -> TwoSteps:
    """Those of two tokens."""
    pairs = list(zip(*system, strict=True))
    return TwoSteps(
        a=system.a,
        diagonal=tuple(a * a + minus_s2 for a, minus_s2 in pairs),
        upper=tuple(2.0 * a * minus_s2 for a, minus_s2 in pairs),
        lower=tuple(a + a for a in system.a),
    )


def load_weights(tables: Any, order: int, channels: Any) -> tuple[tuple, tuple, Lanes]:
    """Weights of u and w in y, and omega."""
    weights_u, imag = load_complex(tables.rows.at[pl.ds(2, 2)], order, channels)
    turns = load_turns(tables, order, channels)
    weights_w = tuple(-(s * c) for s, c in zip(turns, imag, strict=True))
    return weights_u, weights_w, streams.load(tables.omega, channels)


def load_readers(tables: Any, system: System, order: int, channels: Any) -> Readers:
    """How outputs are read from the state before their tokens."""

    def times_m(weights):
        us, ws = [], []
        for u, w, a, minus_s2 in zip(*weights, *system, strict=True):
            us.append(u * a + w)
            ws.append(u * minus_s2 + w * a)
        return tuple(us), tuple(ws)

    *weights, omega = load_weights(tables, order, channels)
    first = times_m(weights)
    taps = sum(weights[0], omega), sum(first[0][1:], first[0][0])
    return Readers(first, times_m(first), taps)


def zeros(count: int) -> tuple[Lanes, ...]:
    """Nothing, in every order."""
    return (streams.fill(0.0),) * count


def load_complex(ref: Any, order: int, channels: Any) -> tuple:
    """Real and imaginary part of a (2, N, D) reference."""
    return tuple(streams.load_rows(ref.at[part], order, channels) for part in (0, 1))


def store_complex(ref: Any, channels: Any, values: tuple) -> None:
    """The inverse of `load_complex`."""
    for part, rows in enumerate(values):
        streams.store_rows(ref.at[part], channels, rows)


def to_pair(h: tuple, tables: Any, channels: Any) -> tuple:
    """(u, w) of a complex state."""
    turns = load_turns(tables, len(h[0]), channels)
    return h[0], tuple(im / s for im, s in zip(h[1], turns, strict=True))


def to_complex(pair: tuple, tables: Any, channels: Any) -> tuple:
    """The complex state of (u, w), or a sum of states."""
    turns = load_turns(tables, len(pair[0]), channels)
    return pair[0], tuple(s * w for s, w in zip(turns, pair[1], strict=True))


def advance(pair: tuple, inputs: Any, system: System) -> tuple:
    """The state after one more token; `inputs` is what each order's u receives."""
    us, ws = [], []
    for u, w, x, a, minus_s2 in zip(*pair, inputs, *system, strict=True):
        us.append(a * u + (minus_s2 * w + x))
        ws.append(a * w + u)
    return tuple(us), tuple(ws)


def advance_one(pair: tuple, x: Lanes, system: System, readers: Readers | None) -> tuple:
    """`advance` by one token that all orders receive; its output too with `readers`."""
    new = advance(pair, [x] * len(system.a), system)
    if readers is None:
        return new, []
    y = readers.taps[0] * x
    for weights, values in zip(readers.first, pair, strict=True):
        for weight, value in zip(weights, values, strict=True):
            y = y + weight * value
    return new, [y]


def advance_two(
    pair: tuple, first: Lanes, second: Lanes, steps: TwoSteps, readers: Readers | None
) -> tuple:
    """The state after two more tokens and, with `readers`, their outputs.

    A multiply-add takes three operands and the registers deliver two in a cycle, so what shares an
    operand stands together: that of u, then that of w.
    """
    us, ws = [], []
    sums: list[Any] = [None] * 4
    if readers is not None:
        tap, next_tap = readers.taps
        sums[:2] = tap * first, next_tap * first + tap * second

    def add(i, product):
        sums[i] = product if sums[i] is None else sums[i] + product

    for n, (u, w) in enumerate(zip(*pair, strict=True)):
        new_u = steps.diagonal[n] * u + (steps.a[n] * first + second)
        new_w = steps.lower[n] * u + first
        if readers is not None:
            add(0, readers.first[0][n] * u)
            add(1, readers.second[0][n] * u)
        us.append(steps.upper[n] * w + new_u)
        ws.append(steps.diagonal[n] * w + new_w)
        if readers is not None:
            add(2, readers.first[1][n] * w)
            add(3, readers.second[1][n] * w)
    outputs = [] if readers is None else [sums[0] + sums[2], sums[1] + sums[3]]
    return (tuple(us), tuple(ws)), outputs


def forward_step(
    steps: TwoSteps, readers: Readers | None, load_single: Callable[[], System]
) -> Callable[..., Any]:
    """A step of one token or two for `Walk`; the coefficients of one are loaded where needed."""

    def step(pair, sources):
        (tokens,) = sources
        if len(tokens) == 1:
            pair, outputs = advance_one(pair, tokens[0], load_single(), readers)
        else:
            pair, outputs = advance_two(pair, tokens[0], tokens[1], steps, readers)
        return pair, [] if readers is None else [outputs]

    return step


def read_out(pair: tuple, x: Lanes, weights: tuple) -> Lanes:
    """An output from the state after its token."""
    read_u, read_w, omega = weights
    even, odd = omega * x, None
    for n, (u, w) in enumerate(zip(*pair, strict=True)):
        even = even + read_u[n] * u
        odd = read_w[n] * w if odd is None else odd + read_w[n] * w
    return even + odd


class Carry(NamedTuple):
    """State of the backward pass: e, the halves of k, Σ x e, Σ x of the halves of k, Σ x dy."""

    e: Any
    k: Any
    x_e: Any
    x_k: Any
    x_dy: Any


def gradient_step(carry, sources, system, weights):
    """A token back in time, for `Walk`: the carry, and dx."""
    (x,), (dy,) = sources
    k = advance(carry.k, carry.e[0], system)
    e = advance(carry.e, [dy] * len(system.a), system)

    def add(totals, values):
        return tuple(
            tuple(total + x * value for total, value in zip(*parts, strict=True))
            for parts in zip(totals, values, strict=True)
        )

    new = Carry(e, k, add(carry.x_e, e), add(carry.x_k, k), carry.x_dy + x * dy)
    return new, [[read_out(e, dy, weights)]]


def derivative(e: tuple, k: tuple, tables: Any, channels: Any) -> tuple:
    """The complex k from its halves; also Σ x k, from Σ x e and the sums of the halves."""
    turns = load_turns(tables, len(e[0]), channels)
    real = tuple(2.0 * m - w for m, w in zip(k[0], e[1], strict=True))
    return real, tuple(2.0 * s * v for s, v in zip(turns, k[1], strict=True))


def add_entering(total: tuple, entering: tuple, k: tuple, tables: Any, channels: Any) -> tuple:
    """total + q h k, and total alone where k is zero, whatever h is."""
    q = load_complex(tables.rows, len(k[0]), channels)
    real, imag = [], []
    pairs = (zip(*z, strict=True) for z in (total, entering, q, k))
    for sums, h, q_n, k_n in zip(*pairs, strict=True):
        qh_real = q_n[0] * h[0] - q_n[1] * h[1]
        qh_imag = q_n[0] * h[1] + q_n[1] * h[0]
        nothing = (k_n[0] == 0) & (k_n[1] == 0)
        more_real = qh_real * k_n[0] - qh_imag * k_n[1]
        more_imag = qh_real * k_n[1] + qh_imag * k_n[0]
        real.append(sums[0] + jnp.where(nothing, jnp.zeros_like(more_real), more_real))
        imag.append(sums[1] + jnp.where(nothing, jnp.zeros_like(more_imag), more_imag))
    return tuple(real), tuple(imag)
