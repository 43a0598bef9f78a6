"""The recurrence of CEMA in registers, one channel per thread; `forward.py` has the algebra.

A pair is the state (u, w) of every order, h = u + i s w.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.cema.mosaic_gpu.layout import Lanes, fill, load, load_complex, load_rows

# The least |Im q| in w = Im h / Im q; a smaller one changes y by less than 2^-40 of its terms.
SMALLEST_IMAG_Q = 2.0**-40


class OneStep(NamedTuple):
    """Coefficients of the step over one token, M = [[a, -s²], [1, a]], of every order."""

    a: tuple[Lanes, ...]
    minus_s2: tuple[Lanes, ...]


class TwoSteps(NamedTuple):
    """Coefficients of the step over two tokens: a; M² = [[diagonal, upper], [lower, diagonal]]."""

    a: tuple[Lanes, ...]
    diagonal: tuple[Lanes, ...]
    upper: tuple[Lanes, ...]
    lower: tuple[Lanes, ...]


class OutputWeights(NamedTuple):
    """Weights of y of two tokens: of the state before them, c M and c M², and of the tokens."""

    first: tuple
    second: tuple
    taps: tuple[Lanes, Lanes]


def load_imag_q(tables: Any, order: int, channels: Any) -> tuple[Lanes, ...]:
    """s = Im q of every order. Loaded at every use: it would occupy registers through the loop."""
    imag_q = []
    for s in load_rows(tables.coefficients.at[1], order, channels):
        least = jnp.full_like(s, SMALLEST_IMAG_Q)
        imag_q.append(jnp.where(jnp.abs(s) < least, jnp.where(s < 0, -least, least), s))
    return tuple(imag_q)


def load_one_step(tables: Any, order: int, channels: Any) -> OneStep:
    """Coefficients of the step over one token."""
    imag_q = load_imag_q(tables, order, channels)
    a = load_rows(tables.coefficients.at[0], order, channels)
    return OneStep(a, tuple(-(s * s) for s in imag_q))


def square(one_step: OneStep) -> TwoSteps:
    """Coefficients of the step over two tokens."""
    pairs = list(zip(*one_step, strict=True))
    return TwoSteps(
        a=one_step.a,
        diagonal=tuple(a * a + minus_s2 for a, minus_s2 in pairs),
        upper=tuple(2.0 * a * minus_s2 for a, minus_s2 in pairs),
        lower=tuple(a + a for a in one_step.a),
    )


def load_weights(tables: Any, order: int, channels: Any) -> tuple[tuple, tuple, Lanes]:
    """Weights of u and w in y, and omega."""
    weights_u, imag = load_complex(tables.coefficients.at[pl.ds(2, 2)], order, channels)
    imag_q = load_imag_q(tables, order, channels)
    weights_w = tuple(-(s * c) for s, c in zip(imag_q, imag, strict=True))
    return weights_u, weights_w, load(tables.omega, channels)


def load_output_weights(tables: Any, one_step: OneStep, order: int, channels: Any) -> OutputWeights:
    """Weights of outputs in terms of the state before their tokens."""

    def times_m(weights):
        us, ws = [], []
        for u, w, a, minus_s2 in zip(*weights, *one_step, strict=True):
            us.append(u * a + w)
            ws.append(u * minus_s2 + w * a)
        return tuple(us), tuple(ws)

    *weights, omega = load_weights(tables, order, channels)
    first = times_m(weights)
    taps = sum(weights[0], omega), sum(first[0][1:], first[0][0])
    return OutputWeights(first, times_m(first), taps)


def zeros(count: int) -> tuple[Lanes, ...]:
    """Zero in every order."""
    return (fill(0.0),) * count


def to_pair(h: tuple, tables: Any, channels: Any) -> tuple:
    """(u, w) of a complex state."""
    imag_q = load_imag_q(tables, len(h[0]), channels)
    return h[0], tuple(im / s for im, s in zip(h[1], imag_q, strict=True))


def to_complex(pair: tuple, tables: Any, channels: Any) -> tuple:
    """The inverse of `to_pair`; also of sums of states."""
    imag_q = load_imag_q(tables, len(pair[0]), channels)
    return pair[0], tuple(s * w for s, w in zip(imag_q, pair[1], strict=True))


def advance(pair: tuple, inputs: Any, one_step: OneStep) -> tuple:
    """The state after one more token; `inputs` is what each order's u receives."""
    us, ws = [], []
    for u, w, x, a, minus_s2 in zip(*pair, inputs, *one_step, strict=True):
        us.append(a * u + (minus_s2 * w + x))
        ws.append(a * w + u)
    return tuple(us), tuple(ws)


def advance_one(pair: tuple, x: Lanes, one_step: OneStep, weights: OutputWeights | None) -> tuple:
    """The state after one more token that all orders receive and, with `weights`, its output."""
    new = advance(pair, [x] * len(one_step.a), one_step)
    if weights is None:
        return new, []
    y = weights.taps[0] * x
    for weights_of_part, part in zip(weights.first, pair, strict=True):
        for weight, value in zip(weights_of_part, part, strict=True):
            y = y + weight * value
    return new, [y]


def advance_two(
    pair: tuple, first: Lanes, second: Lanes, two_steps: TwoSteps, weights: OutputWeights | None
) -> tuple:
    """The state after two more tokens and, with `weights`, their outputs.

    A multiply-add has three operands and the register file delivers two per cycle, so instructions
    that share an operand are adjacent: those of u, then those of w.
    """
    us, ws = [], []
    sums: list[Any] = [None] * 4
    if weights is not None:
        tap, next_tap = weights.taps
        sums[:2] = tap * first, next_tap * first + tap * second

    def add(i, product):
        sums[i] = product if sums[i] is None else sums[i] + product

    for n, (u, w) in enumerate(zip(*pair, strict=True)):
        new_u = two_steps.diagonal[n] * u + (two_steps.a[n] * first + second)
        new_w = two_steps.lower[n] * u + first
        if weights is not None:
            add(0, weights.first[0][n] * u)
            add(1, weights.second[0][n] * u)
        us.append(two_steps.upper[n] * w + new_u)
        ws.append(two_steps.diagonal[n] * w + new_w)
        if weights is not None:
            add(2, weights.first[1][n] * w)
            add(3, weights.second[1][n] * w)
    outputs = [] if weights is None else [sums[0] + sums[2], sums[1] + sums[3]]
    return (tuple(us), tuple(ws)), outputs


def forward_step(
    two_steps: TwoSteps, weights: OutputWeights | None, load_one_step: Callable[[], OneStep]
) -> Callable[..., Any]:
    """The `step` of `TileIterator` for one or two tokens.

    The coefficients of a single token, which only the slow path needs, are loaded at every use.
    """

    def step(pair, sources):
        (tokens,) = sources
        if len(tokens) == 1:
            pair, outputs = advance_one(pair, tokens[0], load_one_step(), weights)
        else:
            pair, outputs = advance_two(pair, tokens[0], tokens[1], two_steps, weights)
        return pair, [] if weights is None else [outputs]

    return step


def project_to_output(pair: tuple, x: Lanes, weights: tuple) -> Lanes:
    """An output from the state after its token."""
    weights_u, weights_w, omega = weights
    even, odd = omega * x, None
    for n, (u, w) in enumerate(zip(*pair, strict=True)):
        even = even + weights_u[n] * u
        odd = weights_w[n] * w if odd is None else odd + weights_w[n] * w
    return even + odd


class GradientCarry(NamedTuple):
    """State of the backward pass: e, the halves of k, Σ x e, Σ x of the halves of k, Σ x dy."""

    e: Any
    k: Any
    x_e: Any
    x_k: Any
    x_dy: Any


def gradient_step(carry, sources, one_step, weights):
    """The `step` of `TileIterator` backward in time: the carry after one token, and its dx."""
    (x,), (dy,) = sources
    k = advance(carry.k, carry.e[0], one_step)
    e = advance(carry.e, [dy] * len(one_step.a), one_step)

    def add(totals, values):
        return tuple(
            tuple(total + x * value for total, value in zip(*parts, strict=True))
            for parts in zip(totals, values, strict=True)
        )

    new = GradientCarry(e, k, add(carry.x_e, e), add(carry.x_k, k), carry.x_dy + x * dy)
    return new, [[project_to_output(e, dy, weights)]]


def derivative(e: tuple, k: tuple, tables: Any, channels: Any) -> tuple:
    """The complex k from its halves; also Σ x k from Σ x e and the sums of the halves."""
    imag_q = load_imag_q(tables, len(e[0]), channels)
    real = tuple(2.0 * m - w for m, w in zip(k[0], e[1], strict=True))
    return real, tuple(2.0 * s * v for s, v in zip(imag_q, k[1], strict=True))


def add_previous_state(x_k: tuple, h: tuple, k: tuple, tables: Any, channels: Any) -> tuple:
    """x_k + q h k; where k is zero, x_k alone even if h is not finite."""
    q = load_complex(tables.coefficients, len(k[0]), channels)
    real, imag = [], []
    by_order = (zip(*z, strict=True) for z in (x_k, h, q, k))
    for sums, h_n, q_n, k_n in zip(*by_order, strict=True):
        qh_real = q_n[0] * h_n[0] - q_n[1] * h_n[1]
        qh_imag = q_n[0] * h_n[1] + q_n[1] * h_n[0]
        is_zero = (k_n[0] == 0) & (k_n[1] == 0)
        added_real = qh_real * k_n[0] - qh_imag * k_n[1]
        added_imag = qh_real * k_n[1] + qh_imag * k_n[0]
        real.append(sums[0] + jnp.where(is_zero, jnp.zeros_like(added_real), added_real))
        imag.append(sums[1] + jnp.where(is_zero, jnp.zeros_like(added_imag), added_imag))
    return tuple(real), tuple(imag)
