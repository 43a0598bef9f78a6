"""CEMA on Hopper: the recurrence in registers, the row split in time.

One thread holds the state of one channel in units of p, h = u + i s w with q = a + i s per order:

    u[t] = a u[t-1] - s² w[t-1] + x[t]        w[t] = a w[t-1] + u[t-1]
    y[t] = Σ_n (Re c u[t] - s Im c w[t]) + omega x[t]                       c = p gamma / √N

That is the complex recurrence with one multiplication less, since w = Im h / s. Backward in time
the same system takes dy to e, of which dx is read like y from h. With k = ∂e/∂q, in halves m, v of
its two numbers so that it too costs three multiplications,

    m[t] = a m[t+1] - s² v[t+1] + e_u[t+1]    v[t] = a v[t+1] + m[t+1]
    Re k = 2 m - e_w                          Im k = 2 s v

    ∂/∂c = Σ x e (+ q h e at the row's first token)        ∂/∂q = c (Σ x k (+ h (e + q k)))

Splits of a row run at once. Before each pass a first kernel sums up what every split hands on, from
zero; the splits after it fold these with q^split. Splits start k at zero: what k would bring in
from later tokens meets x only through the state h entering the later split, which adds q h k.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.cema import mosaic_gpu_stream as streams
from pallas_kernels.cema.mosaic_gpu_stream import CHANNELS, TILE, Borders, Lanes, Place

# The least |Im q| in w = Im h / Im q; a smaller one changes y by less than 2^-40 of its terms.
SMALLEST_TURN = 2.0**-40


class Tables(NamedTuple):
    """What the kernels know of the parameters.

    Attributes:
      rows: real and imaginary part of q, those of c, those of q^split.
      omega: weight of the direct path.
      damping: the least 1 - |q| of every block of channels.
    """

    rows: Float[Array, "6 N D"]
    omega: Float[Array, " D"]
    damping: Float[Array, " blocks"]


class Documents(NamedTuple):
    """Borders of packed rows.

    Attributes:
      bits: for every tile, a bit for every token that starts a document, and for every padding one.
        The row's first document starts only after padding.
      ends: the row's first and last token that is not padding; -1 where all are.
      hands_on: 1 where no document starts in the split.
    """

    bits: Int32[Array, "B tiles 2"]
    ends: Int32[Array, "B 2"]
    hands_on: Int32[Array, "B S"]


class Geometry(NamedTuple):
    """Static sizes of a call.

    Attributes:
      rows: B.
      tiles: L / TILE.
      blocks: D / CHANNELS.
      order: N.
      tiles_per_split: of every split but the last, which may be shorter.
    """

    rows: int
    tiles: int
    blocks: int
    order: int
    tiles_per_split: int

    @property
    def splits(self) -> int:
        """Splits of a row."""
        return -(-self.tiles // self.tiles_per_split)

    def find_place(self, split: Any) -> Place:
        """The place of a split."""
        return streams.find_place(split, self.tiles_per_split, self.tiles)


class _Operands(NamedTuple):
    """What all kernels read, beside the sequences; None what a call has not.

    Attributes:
      tables: the parameters.
      documents: borders.
      initial: the state before every row.
      summaries: what splits hand on; without the row's last split, backward without its first.
      entering: the state entering every split.
    """

    tables: Any
    documents: Any = None
    initial: Any = None
    summaries: Any = None
    entering: Any = None


class _System(NamedTuple):
    """Coefficients of M = [[a, -s²], [1, a]] in registers, a Lanes for every order."""

    a: tuple[Lanes, ...]
    minus_s2: tuple[Lanes, ...]


class _TwoSteps(NamedTuple):
    """Coefficients of two tokens at once: a, and M² = [[diagonal, upper], [lower, diagonal]]."""

    a: tuple[Lanes, ...]
    diagonal: tuple[Lanes, ...]
    upper: tuple[Lanes, ...]
    lower: tuple[Lanes, ...]


class _Readers(NamedTuple):
    """How y of two tokens is read from the state before: c M, c M²; and from the tokens."""

    first: tuple
    second: tuple
    taps: tuple[Lanes, Lanes]


def _load_turns(tables: Any, order: int, channels: Any) -> tuple[Lanes, ...]:
    """s of every order. Loaded wherever it is needed: it would hold registers through the loop."""
    turns = []
    for s in streams.load_rows(tables.rows.at[1], order, channels):
        least = jnp.full_like(s, SMALLEST_TURN)
        turns.append(jnp.where(jnp.abs(s) < least, jnp.where(s < 0, -least, least), s))
    return tuple(turns)


def _load_system(tables: Any, order: int, channels: Any) -> _System:
    turns = _load_turns(tables, order, channels)
    a = streams.load_rows(tables.rows.at[0], order, channels)
    return _System(a, tuple(-(s * s) for s in turns))


def _square(system: _System) -> _TwoSteps:
    pairs = list(zip(*system, strict=True))
    return _TwoSteps(
        a=system.a,
        diagonal=tuple(a * a + minus_s2 for a, minus_s2 in pairs),
        upper=tuple(2.0 * a * minus_s2 for a, minus_s2 in pairs),
        lower=tuple(a + a for a in system.a),
    )


def _load_weights(tables: Any, order: int, channels: Any) -> tuple[tuple, tuple, Lanes]:
    """Weights of u and w in y, and omega."""
    weights_u, imag = _load_complex(tables.rows.at[pl.ds(2, 2)], order, channels)
    turns = _load_turns(tables, order, channels)
    weights_w = tuple(-(s * c) for s, c in zip(turns, imag, strict=True))
    return weights_u, weights_w, streams.load(tables.omega, channels)


def _load_readers(tables: Any, system: _System, order: int, channels: Any) -> _Readers:
    def times_m(weights):
        us, ws = [], []
        for u, w, a, minus_s2 in zip(*weights, *system, strict=True):
            us.append(u * a + w)
            ws.append(u * minus_s2 + w * a)
        return tuple(us), tuple(ws)

    *weights, omega = _load_weights(tables, order, channels)
    first = times_m(weights)
    taps = sum(weights[0], omega), sum(first[0][1:], first[0][0])
    return _Readers(first, times_m(first), taps)


def _zeros(count: int) -> tuple[Lanes, ...]:
    return (streams.fill(0.0),) * count


def _load_complex(ref: Any, order: int, channels: Any) -> tuple:
    """Real and imaginary part of a (2, N, D) reference."""
    return tuple(streams.load_rows(ref.at[part], order, channels) for part in (0, 1))


def _store_complex(ref: Any, channels: Any, values: tuple) -> None:
    for part, rows in enumerate(values):
        streams.store_rows(ref.at[part], channels, rows)


def _to_pair(h: tuple, tables: Any, channels: Any) -> tuple:
    turns = _load_turns(tables, len(h[0]), channels)
    return h[0], tuple(im / s for im, s in zip(h[1], turns, strict=True))


def _to_complex(pair: tuple, tables: Any, channels: Any) -> tuple:
    turns = _load_turns(tables, len(pair[0]), channels)
    return pair[0], tuple(s * w for s, w in zip(turns, pair[1], strict=True))


def _find_horizon(tables: Any, place: Place) -> Any:
    """Tiles after which less than 2^-64 of any state is left: |q|^t <= exp(-(1 - |q|) t)."""
    tiles = 64 * math.log(2) / TILE / jnp.maximum(tables.damping[place.block], 2.0**-24)
    return tiles.astype(jnp.int32) + 1


def _advance(pair: tuple, inputs: Any, system: _System) -> tuple:
    """The state after one more token; `inputs` is what each order's u receives."""
    us, ws = [], []
    for u, w, x, a, minus_s2 in zip(*pair, inputs, *system, strict=True):
        us.append(a * u + (minus_s2 * w + x))
        ws.append(a * w + u)
    return tuple(us), tuple(ws)


def _advance_one(pair: tuple, x: Lanes, steps: _TwoSteps, readers: _Readers | None) -> tuple:
    minus_s2 = tuple(d - a * a for d, a in zip(steps.diagonal, steps.a, strict=True))
    new = _advance(pair, [x] * len(steps.a), _System(steps.a, minus_s2))
    if readers is None:
        return new, []
    y = readers.taps[0] * x
    for weights, values in zip(readers.first, pair, strict=True):
        for weight, value in zip(weights, values, strict=True):
            y = y + weight * value
    return new, [y]


def _advance_two(
    pair: tuple, first: Lanes, second: Lanes, steps: _TwoSteps, readers: _Readers | None
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


def _forward_step(steps: _TwoSteps, readers: _Readers | None) -> Any:
    """A step of one token or two, for `walk`."""

    def step(pair, sources):
        (tokens,) = sources
        advance = _advance_one if len(tokens) == 1 else _advance_two
        pair, outputs = advance(pair, *tokens, steps, readers)
        return pair, [] if readers is None else [outputs]

    return step


def _read_out(pair: tuple, x: Lanes, weights: tuple) -> Lanes:
    read_u, read_w, omega = weights
    even, odd = omega * x, None
    for n, (u, w) in enumerate(zip(*pair, strict=True)):
        even = even + read_u[n] * u
        odd = read_w[n] * w if odd is None else odd + read_w[n] * w
    return even + odd


def _fold(
    h: tuple, operands: _Operands, place: Place, geometry: Geometry, *, backward: bool
) -> tuple:
    """The complex state entering the place's split, from `h` at the row's near end."""
    if operands.summaries is None:
        return h
    order, tables = geometry.order, operands.tables
    factor = _load_complex(tables.rows.at[pl.ds(4, 2)], order, place.channels)
    count = geometry.splits - 1 - place.split if backward else place.split
    # What lies beyond the horizon has no part in it, not even h.
    near = lax.div(_find_horizon(tables, place), geometry.tiles_per_split) + 1
    skipped = jnp.maximum(count - near, 0)

    def keep_if(flag, h):
        return tuple(tuple(streams.select(flag, v, jnp.zeros_like(v)) for v in p) for p in h)

    def body(i, h):
        index = geometry.splits - 2 - i if backward else i
        passed = index + 1 if backward else index
        added = _load_complex(operands.summaries.at[place.row, index], order, place.channels)
        if operands.documents is not None:
            h = keep_if(operands.documents.hands_on[place.row, passed] == 1, h)
        real, imag = [], []
        for n in range(order):
            real.append(added[0][n] + factor[0][n] * h[0][n] - factor[1][n] * h[1][n])
            imag.append(added[1][n] + factor[0][n] * h[1][n] + factor[1][n] * h[0][n])
        return tuple(real), tuple(imag)

    return lax.fori_loop(skipped, count, body, keep_if(skipped == 0, h))


def _run(
    operands: _Operands, place: Place, step, restart, *, tokens=1, event=None, end=None, backward
):
    """A `run_tile` for `stream` that takes the slow way only through tiles with borders.

    A step takes `tokens` at once where there are no borders. `event` happens at the row's first
    token if `end` is 0, at its last if 1.
    """
    documents = operands.documents

    def find_borders(tile):
        position = jnp.int32(-1)
        if end is not None:
            offset = documents.ends[place.row, end] - tile * TILE
            position = jnp.where((offset >= 0) & (offset < TILE), offset, -1)
        bits = documents.bits
        return Borders(bits[place.row, tile, 0], bits[place.row, tile, 1], position)

    def run_tile(tile, read, written, carry):
        walk = streams.Walk(read, written, step, tokens, backward)
        if documents is None:
            return walk.through_tile(carry)
        borders = find_borders(tile)
        bordered = partial(
            walk.through_borders, borders=borders, restart=partial(restart, tile), event=event
        )
        return lax.cond(borders.is_plain, walk.through_tile, bordered, carry)

    return run_tile


def _enter_document(operands: _Operands, place: Place, order: int) -> Any:
    """What a document starts from: the carried state if it is the row's first, else zero."""
    zeros = _zeros(order), _zeros(order)

    def restart(tile, position, carry):
        if operands.initial is None:
            return zeros
        is_first = operands.documents.ends[place.row, 0] == tile * TILE + position

        def carried():
            h = _load_complex(operands.initial.at[place.row], order, place.channels)
            return _to_pair(h, operands.tables, place.channels)

        return lax.cond(is_first, carried, lambda: zeros)

    return restart


def _summary_kernel(split, stage, x, operands, summaries, *, geometry: Geometry, backward: bool):
    """What a split adds to the state after it, or before it if backward, from its tokens alone."""
    order = geometry.order
    zeros = _zeros(order), _zeros(order)
    # Backward, the row's first split has nobody to hand anything to.
    place = geometry.find_place(split + 1 if backward else split)
    # Tokens farther from the border than the horizon leave nothing there.
    count = jnp.minimum(place.count, _find_horizon(operands.tables, place))
    first = place.first if backward else place.first + place.count - count
    near = place._replace(first=first, count=count)
    steps = _square(_load_system(operands.tables, order, place.channels))
    restart = _enter_document(operands, place, order)
    step = _forward_step(steps, None)
    run = _run(operands, near, step, restart, tokens=2, backward=backward)
    pair = streams.stream(near, stage, [x], [], zeros, run, backward=backward)
    h = _to_complex(pair, operands.tables, place.channels)
    _store_complex(summaries.at[place.row, split], place.channels, h)


def _output_kernel(split, stage, x, operands, results, *, geometry: Geometry):
    y, last, entering = results
    order = geometry.order
    place = geometry.find_place(split)
    channels, tables = place.channels, operands.tables
    h = _zeros(order), _zeros(order)
    if operands.initial is not None:
        h = _load_complex(operands.initial.at[place.row], order, channels)
    h = _fold(h, operands, place, geometry, backward=False)
    _store_complex(entering.at[place.row, split], channels, h)
    system = _load_system(tables, order, channels)
    step = _forward_step(_square(system), _load_readers(tables, system, order, channels))

    def store_last(pair):
        _store_complex(last.at[place.row], channels, _to_complex(pair, tables, channels))

    restart = _enter_document(operands, place, order)
    run = _run(operands, place, step, restart, tokens=2, event=store_last, end=1, backward=False)
    start = _to_pair(h, tables, channels)
    pair = streams.stream(place, stage, [x], [y], start, run, backward=False)
    if operands.documents is None:
        pl.when(split == geometry.splits - 1)(partial(store_last, pair))
    plgpu.wait_smem_to_gmem(0)


class _Carry(NamedTuple):
    """State of the backward pass: e, the halves of k, Σ x e, Σ x of the halves of k, Σ x dy."""

    e: Any
    k: Any
    x_e: Any
    x_k: Any
    x_dy: Any


def _gradient_step(carry, sources, system, weights):
    (x,), (dy,) = sources
    k = _advance(carry.k, carry.e[0], system)
    e = _advance(carry.e, [dy] * len(system.a), system)

    def add(totals, values):
        return tuple(
            tuple(total + x * value for total, value in zip(*parts, strict=True))
            for parts in zip(totals, values, strict=True)
        )

    new = _Carry(e, k, add(carry.x_e, e), add(carry.x_k, k), carry.x_dy + x * dy)
    return new, [[_read_out(e, dy, weights)]]


def _derivative(e: tuple, k: tuple, tables: Any, channels: Any) -> tuple:
    """The complex k from its halves; also Σ x k, from Σ x e and the sums of the halves."""
    turns = _load_turns(tables, len(e[0]), channels)
    real = tuple(2.0 * m - w for m, w in zip(k[0], e[1], strict=True))
    return real, tuple(2.0 * s * v for s, v in zip(turns, k[1], strict=True))


def _add_entering(total: tuple, entering: tuple, k: tuple, tables: Any, channels: Any):
    """total + q h k."""
    order = len(k[0])
    q = _load_complex(tables.rows, order, channels)
    real, imag = [], []
    for n in range(order):
        qh_real = q[0][n] * entering[0][n] - q[1][n] * entering[1][n]
        qh_imag = q[0][n] * entering[1][n] + q[1][n] * entering[0][n]
        real.append(total[0][n] + qh_real * k[0][n] - qh_imag * k[1][n])
        imag.append(total[1][n] + qh_real * k[1][n] + qh_imag * k[0][n])
    return tuple(real), tuple(imag)


def _gradient_kernel(split, stage, x, dy, operands, results, *, geometry: Geometry):
    order, tables = geometry.order, operands.tables
    place = geometry.find_place(split)
    channels = place.channels
    zeros = _zeros(order), _zeros(order)
    e = _fold(zeros, operands, place, geometry, backward=True)
    system = _load_system(tables, order, channels)
    weights = _load_weights(tables, order, channels)
    e = _to_pair(e, tables, channels)
    # k = 0: the half m holds k and e_w together.
    k = tuple(0.5 * w for w in e[1]), zeros[1]

    def restart(tile, position, carry):
        return carry._replace(e=zeros, k=zeros)

    def store_first(carry):
        k = _derivative(carry.e, carry.k, tables, channels)
        _store_complex(
            results.first_e.at[place.row], channels, _to_complex(carry.e, tables, channels)
        )
        _store_complex(results.first_k.at[place.row], channels, k)

    step = partial(_gradient_step, system=system, weights=weights)
    run = _run(operands, place, step, restart, event=store_first, end=0, backward=True)
    carry = _Carry(e, k, zeros, zeros, zeros[0][0])
    carry = streams.stream(place, stage, [x, dy], [results.dx], carry, run, backward=True)
    if operands.documents is None:
        pl.when(split == 0)(partial(store_first, carry))
    h = _load_complex(operands.entering.at[place.row, split], order, channels)
    total = _derivative(carry.x_e, carry.x_k, tables, channels)
    k = _derivative(carry.e, carry.k, tables, channels)
    total = _add_entering(total, h, k, tables, channels)
    here = place.row, split
    _store_complex(results.x_e.at[here], channels, _to_complex(carry.x_e, tables, channels))
    _store_complex(results.x_k.at[here], channels, total)
    results.x_dy[*here, channels] = carry.x_dy
    plgpu.wait_smem_to_gmem(0)


def _per_channel(geometry: Geometry, *shape: int) -> jax.ShapeDtypeStruct:
    width = geometry.blocks * CHANNELS
    return jax.ShapeDtypeStruct((geometry.rows, *shape, width), jnp.float32)


def _summarize(x, operands: _Operands, geometry: Geometry, interpret, *, backward) -> Array | None:
    if geometry.splits == 1:
        return None
    return streams.launch(
        partial(_summary_kernel, geometry=geometry, backward=backward),
        (x, operands),
        _per_channel(geometry, geometry.splits - 1, 2, geometry.order),
        name="cema_summaries",
        grid=(geometry.blocks, geometry.splits - 1, geometry.rows),
        staged=[x.dtype],
        arrivals=1,
        interpret=interpret,
    )


def run_forward(
    x: Float[Array, "B L D"],
    tables: Tables,
    initial: Float[Array, "B 2 N D"] | None,
    documents: Documents | None,
    geometry: Geometry,
    *,
    out_dtype: Any,
    interpret: Any,
) -> tuple[Float[Array, "B L D"], Float[Array, "B 2 N D"], Float[Array, "B S 2 N D"]]:
    """y, the last state of every row and the state entering every split, states in units of p.

    The last state of a packed row without tokens is undefined.
    """
    operands = _Operands(tables, documents, initial)
    summaries = _summarize(x, operands, geometry, interpret, backward=False)
    return streams.launch(
        partial(_output_kernel, geometry=geometry),
        (x, operands._replace(summaries=summaries)),
        (
            jax.ShapeDtypeStruct(x.shape, out_dtype),
            _per_channel(geometry, 2, geometry.order),
            _per_channel(geometry, geometry.splits, 2, geometry.order),
        ),
        name="cema_outputs",
        grid=(geometry.blocks, geometry.splits, geometry.rows),
        staged=[x.dtype, out_dtype],
        arrivals=1,
        interpret=interpret,
    )


class Gradients(NamedTuple):
    """Results of the backward pass.

    Attributes:
      dx: gradient of x.
      x_e: Σ x e of every split.
      x_k: Σ x k of every split, with q h k of its first token.
      x_dy: Σ x dy of every split.
      first_e: e at the row's first token; undefined in a packed row without tokens.
      first_k: k at the row's first token, from the end of its split.
    """

    dx: Float[Array, "B L D"]
    x_e: Float[Array, "B S 2 N D"]
    x_k: Float[Array, "B S 2 N D"]
    x_dy: Float[Array, "B S D"]
    first_e: Float[Array, "B 2 N D"]
    first_k: Float[Array, "B 2 N D"]


def run_backward(
    x: Float[Array, "B L D"],
    dy: Float[Array, "B L D"],
    tables: Tables,
    entering: Float[Array, "B S 2 N D"],
    documents: Documents | None,
    geometry: Geometry,
    *,
    out_dtype: Any,
    interpret: Any,
) -> Gradients:
    """Gradients of Σ y dy from the states that `run_forward` found to enter the splits."""
    operands = _Operands(tables, documents)
    summaries = _summarize(dy, operands, geometry, interpret, backward=True)
    order, splits = geometry.order, geometry.splits
    return streams.launch(
        partial(_gradient_kernel, geometry=geometry),
        (x, dy, operands._replace(summaries=summaries, entering=entering)),
        Gradients(
            dx=jax.ShapeDtypeStruct(x.shape, out_dtype),
            x_e=_per_channel(geometry, splits, 2, order),
            x_k=_per_channel(geometry, splits, 2, order),
            x_dy=_per_channel(geometry, splits),
            first_e=_per_channel(geometry, 2, order),
            first_k=_per_channel(geometry, 2, order),
        ),
        name="cema_gradients",
        grid=(geometry.blocks, geometry.splits, geometry.rows),
        staged=[x.dtype, dy.dtype, out_dtype],
        arrivals=2,
        interpret=interpret,
    )
