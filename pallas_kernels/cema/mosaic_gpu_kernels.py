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
# Warpgroups of a block of threads, for the registers that the forward and backward pass need.
FORWARD_WARPGROUPS = 4
BACKWARD_WARPGROUPS = 2


class Tables(NamedTuple):
    """What the kernels know of the parameters; complex numbers as [real rows | imaginary rows].

    Attributes:
      rows: q, c and omega.
      jump: q^split.
      horizon: tiles after which less than 2^-64 of a state is left, for every block of channels.
    """

    rows: Float[Array, "4N+1 D"]
    jump: Float[Array, "2N D"]
    horizon: Int32[Array, " blocks"]


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
    """Coefficients of the recurrence of one channel in registers, a Lanes for every order."""

    a: tuple[Lanes, ...]
    minus_s2: tuple[Lanes, ...]


def _load_turns(rows: Any, order: int, channels: Any) -> tuple[Lanes, ...]:
    """s of every order. Loaded wherever it is needed: it would hold registers through the loop."""
    turns = []
    for s in streams.load_rows(rows, order, order, channels):
        least = jnp.full_like(s, SMALLEST_TURN)
        turns.append(jnp.where(jnp.abs(s) < least, jnp.where(s < 0, -least, least), s))
    return tuple(turns)


def _load_system(rows: Any, order: int, channels: Any) -> _System:
    turns = _load_turns(rows, order, channels)
    a = streams.load_rows(rows, 0, order, channels)
    return _System(a, tuple(-(s * s) for s in turns))


def _load_readers(rows: Any, order: int, channels: Any) -> tuple:
    read_u = streams.load_rows(rows, 2 * order, order, channels)
    imag = streams.load_rows(rows, 3 * order, order, channels)
    turns = _load_turns(rows, order, channels)
    read_w = tuple(-(s * c) for s, c in zip(turns, imag, strict=True))
    return read_u, read_w, streams.load(rows, 4 * order, channels)


def _zeros(count: int) -> tuple[Lanes, ...]:
    return (streams.fill(0.0),) * count


def _load_complex(ref: Any, order: int, channels: Any) -> tuple:
    return (
        streams.load_rows(ref, 0, order, channels),
        streams.load_rows(ref, order, order, channels),
    )


def _store_complex(ref: Any, channels: Any, real: Any, imag: Any) -> None:
    streams.store_rows(ref, 0, channels, real)
    streams.store_rows(ref, len(real), channels, imag)


def _to_pair(h: tuple, rows: Any, channels: Any) -> tuple:
    turns = _load_turns(rows, len(h[0]), channels)
    return h[0], tuple(im / s for im, s in zip(h[1], turns, strict=True))


def _to_complex(pair: tuple, rows: Any, channels: Any) -> tuple:
    turns = _load_turns(rows, len(pair[0]), channels)
    return pair[0], tuple(s * w for s, w in zip(turns, pair[1], strict=True))


def _advance(pair: tuple, inputs: Any, system: _System) -> tuple:
    """The state after one more token; `inputs` is what each order's u receives."""
    us, ws = [], []
    for u, w, x, a, minus_s2 in zip(*pair, inputs, system.a, system.minus_s2, strict=True):
        us.append(a * u + (minus_s2 * w + x))
        ws.append(a * w + u)
    return tuple(us), tuple(ws)


def _read_out(pair: tuple, x: Lanes, readers: tuple) -> Lanes:
    read_u, read_w, omega = readers
    # Four sums side by side: one alone would wait for itself at every order.
    sums: list[Any] = [omega * x, None, None, None]
    for n, (u, w) in enumerate(zip(*pair, strict=True)):
        for i, product in ((2 * (n % 2), read_u[n] * u), (2 * (n % 2) + 1, read_w[n] * w)):
            sums[i] = product if sums[i] is None else sums[i] + product
    real = [total for total in sums if total is not None]
    while len(real) > 1:
        real = [sum(real[i + 1 : i + 2], real[i]) for i in range(0, len(real), 2)]
    return real[0]


def _fold(
    h: tuple, operands: _Operands, place: Place, geometry: Geometry, *, backward: bool
) -> tuple:
    """The complex state entering the place's split, from `h` at the row's near end."""
    if operands.summaries is None:
        return h
    order, tables = geometry.order, operands.tables
    factor = _load_complex(tables.jump, order, place.channels)
    count = geometry.splits - 1 - place.split if backward else place.split
    # What lies beyond the horizon has no part in it, not even h.
    near = lax.div(tables.horizon[place.block], geometry.tiles_per_split) + 1
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


def _run(operands: _Operands, place: Place, step, restart, *, event=None, end=None, backward):
    """A `run_tile` for `stream` that takes the slow way only through tiles with borders.

    `event` happens at the row's first token if `end` is 0, at its last if 1.
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
        plain = partial(streams.walk, read, written, step=step, backward=backward)
        if documents is None:
            return plain(carry)
        borders = find_borders(tile)
        bordered = partial(
            streams.walk_with_borders,
            read,
            written,
            step=step,
            borders=borders,
            restart=partial(restart, tile),
            event=event,
            backward=backward,
        )
        return lax.cond(borders.is_plain, plain, bordered, carry)

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
            return _to_pair(h, operands.tables.rows, place.channels)

        return lax.cond(is_first, carried, lambda: zeros)

    return restart


def _summary_kernel(split, stage, x, operands, summaries, *, geometry: Geometry, backward: bool):
    """What a split adds to the state after it, or before it if backward, from its tokens alone."""
    order = geometry.order
    zeros = _zeros(order), _zeros(order)
    # Backward, the row's first split has nobody to hand anything to.
    place = geometry.find_place(split + 1 if backward else split)
    # Tokens farther from the border than the horizon leave nothing there.
    count = jnp.minimum(place.count, operands.tables.horizon[place.block])
    first = place.first if backward else place.first + place.count - count
    near = place._replace(first=first, count=count)
    system = _load_system(operands.tables.rows, order, place.channels)

    def step(pair, tokens):
        return _advance(pair, tokens * order, system), []

    restart = _enter_document(operands, place, order)
    run = _run(operands, near, step, restart, backward=backward)
    pair = streams.stream(near, stage, [x], [], zeros, run, backward=backward)
    h = _to_complex(pair, operands.tables.rows, place.channels)
    _store_complex(summaries.at[place.row, split], place.channels, *h)


def _output_kernel(split, stage, x, operands, results, *, geometry: Geometry):
    y, last, entering = results
    order = geometry.order
    place = geometry.find_place(split)
    channels, rows = place.channels, operands.tables.rows
    h = _zeros(order), _zeros(order)
    if operands.initial is not None:
        h = _load_complex(operands.initial.at[place.row], order, channels)
    h = _fold(h, operands, place, geometry, backward=False)
    _store_complex(entering.at[place.row, split], channels, *h)
    system = _load_system(rows, order, channels)
    readers = _load_readers(rows, order, channels)

    def step(pair, tokens):
        pair = _advance(pair, tokens * order, system)
        return pair, [_read_out(pair, tokens[0], readers)]

    def store_last(pair):
        _store_complex(last.at[place.row], channels, *_to_complex(pair, rows, channels))

    restart = _enter_document(operands, place, order)
    run = _run(operands, place, step, restart, event=store_last, end=1, backward=False)
    start = _to_pair(h, rows, channels)
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


def _gradient_step(carry, tokens, system, readers):
    x, dy = tokens
    k = _advance(carry.k, carry.e[0], system)
    e = _advance(carry.e, [dy] * len(system.a), system)

    def add(totals, values):
        return tuple(
            tuple(total + x * value for total, value in zip(*parts, strict=True))
            for parts in zip(totals, values, strict=True)
        )

    new = _Carry(e, k, add(carry.x_e, e), add(carry.x_k, k), carry.x_dy + x * dy)
    return new, [_read_out(e, dy, readers)]


def _derivative(e: tuple, k: tuple, rows: Any, channels: Any) -> tuple:
    """The complex k from its halves; also Σ x k, from Σ x e and the sums of the halves."""
    turns = _load_turns(rows, len(e[0]), channels)
    real = tuple(2.0 * m - w for m, w in zip(k[0], e[1], strict=True))
    return real, tuple(2.0 * s * v for s, v in zip(turns, k[1], strict=True))


def _add_entering(total: tuple, entering: tuple, k: tuple, table: Any, order: int, channels: Any):
    """total + q h k."""
    q = _load_complex(table, order, channels)
    real, imag = [], []
    for n in range(order):
        qh_real = q[0][n] * entering[0][n] - q[1][n] * entering[1][n]
        qh_imag = q[0][n] * entering[1][n] + q[1][n] * entering[0][n]
        real.append(total[0][n] + qh_real * k[0][n] - qh_imag * k[1][n])
        imag.append(total[1][n] + qh_real * k[1][n] + qh_imag * k[0][n])
    return tuple(real), tuple(imag)


def _gradient_kernel(split, stage, x, dy, operands, results, *, geometry: Geometry):
    order, rows = geometry.order, operands.tables.rows
    place = geometry.find_place(split)
    channels = place.channels
    zeros = _zeros(order), _zeros(order)
    e = _fold(zeros, operands, place, geometry, backward=True)
    system = _load_system(rows, order, channels)
    readers = _load_readers(rows, order, channels)
    e = _to_pair(e, rows, channels)
    # k = 0: the half m holds k and e_w together.
    k = tuple(0.5 * w for w in e[1]), zeros[1]

    def restart(tile, position, carry):
        return carry._replace(e=zeros, k=zeros)

    def store_first(carry):
        k = _derivative(carry.e, carry.k, rows, channels)
        _store_complex(
            results.first_e.at[place.row], channels, *_to_complex(carry.e, rows, channels)
        )
        _store_complex(results.first_k.at[place.row], channels, *k)

    step = partial(_gradient_step, system=system, readers=readers)
    run = _run(operands, place, step, restart, event=store_first, end=0, backward=True)
    carry = _Carry(e, k, zeros, zeros, zeros[0][0])
    carry = streams.stream(place, stage, [x, dy], [results.dx], carry, run, backward=True)
    if operands.documents is None:
        pl.when(split == 0)(partial(store_first, carry))
    h = _load_complex(operands.entering.at[place.row, split], order, channels)
    total = _derivative(carry.x_e, carry.x_k, rows, channels)
    k = _derivative(carry.e, carry.k, rows, channels)
    total = _add_entering(total, h, k, rows, order, channels)
    here = place.row, split
    _store_complex(results.x_e.at[here], channels, *_to_complex(carry.x_e, rows, channels))
    _store_complex(results.x_k.at[here], channels, *total)
    streams.store_rows(results.x_dy.at[here], 0, channels, [carry.x_dy])
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
        _per_channel(geometry, geometry.splits - 1, 2 * geometry.order),
        grid=(geometry.blocks, geometry.splits - 1, geometry.rows),
        warpgroups=FORWARD_WARPGROUPS,
        staged=[x.dtype],
        arrivals=1,
        interpret=interpret,
    )


def run_forward(
    x: Float[Array, "B L D"],
    tables: Tables,
    initial: Float[Array, "B 2N D"] | None,
    documents: Documents | None,
    geometry: Geometry,
    *,
    out_dtype: Any,
    interpret: Any,
) -> tuple[Float[Array, "B L D"], Float[Array, "B 2N D"], Float[Array, "B S 2N D"]]:
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
            _per_channel(geometry, 2 * geometry.order),
            _per_channel(geometry, geometry.splits, 2 * geometry.order),
        ),
        grid=(geometry.blocks, geometry.splits, geometry.rows),
        warpgroups=FORWARD_WARPGROUPS,
        staged=[x.dtype, out_dtype],
        arrivals=1,
        interpret=interpret,
    )


class Gradients(NamedTuple):
    """Results of the backward pass; complex numbers as [real rows | imaginary rows].

    Attributes:
      dx: gradient of x.
      x_e: Σ x e of every split.
      x_k: Σ x k of every split, with q h k of its first token.
      x_dy: Σ x dy of every split.
      first_e: e at the row's first token; undefined in a packed row without tokens.
      first_k: k at the row's first token, from the end of its split.
    """

    dx: Float[Array, "B L D"]
    x_e: Float[Array, "B S 2N D"]
    x_k: Float[Array, "B S 2N D"]
    x_dy: Float[Array, "B S 1 D"]
    first_e: Float[Array, "B 2N D"]
    first_k: Float[Array, "B 2N D"]


def run_backward(
    x: Float[Array, "B L D"],
    dy: Float[Array, "B L D"],
    tables: Tables,
    entering: Float[Array, "B S 2N D"],
    documents: Documents | None,
    geometry: Geometry,
    *,
    out_dtype: Any,
    interpret: Any,
) -> Gradients:
    """Gradients of Σ y dy from the states that `run_forward` found to enter the splits."""
    operands = _Operands(tables, documents)
    summaries = _summarize(dy, operands, geometry, interpret, backward=True)
    order, splits = 2 * geometry.order, geometry.splits
    return streams.launch(
        partial(_gradient_kernel, geometry=geometry),
        (x, dy, operands._replace(summaries=summaries, entering=entering)),
        Gradients(
            dx=jax.ShapeDtypeStruct(x.shape, out_dtype),
            x_e=_per_channel(geometry, splits, order),
            x_k=_per_channel(geometry, splits, order),
            x_dy=_per_channel(geometry, splits, 1),
            first_e=_per_channel(geometry, order),
            first_k=_per_channel(geometry, order),
        ),
        grid=(geometry.blocks, geometry.splits, geometry.rows),
        warpgroups=BACKWARD_WARPGROUPS,
        staged=[x.dtype, dy.dtype, out_dtype],
        arrivals=2,
        interpret=interpret,
    )
