"""CEMA on Hopper: the recurrence in registers, the row split in time.

One thread holds the state of one channel in units of p, h = u + i s w with q = a + i s per order:

    u[t] = a u[t-1] - s² w[t-1] + x[t]        w[t] = a w[t-1] + u[t-1]
    y[t] = Σ_n (Re c u[t] - s Im c w[t]) + omega x[t]                       c = p gamma / √N

That is the complex recurrence with one multiplication less, since w = Im h / s. Backward in time the
same system takes dy to e, of which dx is read like y from h. With k = ∂e/∂q, in halves m, v of its
two numbers so that it too costs three multiplications,

    m[t] = a m[t+1] - s² v[t+1] + e_u[t+1]    v[t] = a v[t+1] + m[t+1]
    Re k = 2 m - e_w                          Im k = 2 s v

    ∂/∂c = Σ x e (+ q h e at the row's first token)        ∂/∂q = c (Σ x k (+ h (e + q k)))

Splits of a row run at once. Before each pass a first kernel sums up what every split hands on, from
zero; the splits after it fold these with q^split. Splits start k at zero: what k would bring in from
later tokens meets x only through the state h entering the later split, which adds q h k itself.
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
from pallas_kernels.cema.mosaic_gpu_stream import BUFFERS, CHANNELS, TILE, Borders, Lanes, Place

# The least |Im q| in w = Im h / Im q; a smaller one changes y by less than 2^-40 of its terms.
SMALLEST_TURN = 2.0**-40


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
      ends: the row's first and last token that is not padding.
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
      packed: whether there are `Documents`.
    """

    rows: int
    tiles: int
    blocks: int
    order: int
    tiles_per_split: int
    packed: bool

    @property
    def splits(self) -> int:
        """Splits of a row."""
        return -(-self.tiles // self.tiles_per_split)


class _System(NamedTuple):
    """Coefficients of one channel in registers, a Lanes for every order."""

    a: tuple[Lanes, ...]
    s: tuple[Lanes, ...]
    minus_s2: tuple[Lanes, ...]


def _load_system(table: Any, order: int, channels: Any) -> _System:
    a = streams.load_rows(table, 0, order, channels)
    turns = []
    for s in streams.load_rows(table, order, order, channels):
        smallest = jnp.where(s < 0, jnp.full_like(s, -SMALLEST_TURN), jnp.full_like(s, SMALLEST_TURN))
        turns.append(jnp.where(jnp.abs(s) < SMALLEST_TURN, smallest, s))
    return _System(a, tuple(turns), tuple(-(s * s) for s in turns))


def _load_readers(table: Any, system: _System, order: int, channels: Any) -> tuple:
    read_u = streams.load_rows(table, 2 * order, order, channels)
    imag = streams.load_rows(table, 3 * order, order, channels)
    read_w = tuple(-(s * c) for s, c in zip(system.s, imag, strict=True))
    return read_u, read_w, streams.load(table, 4 * order, channels)


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


def _to_pair(h: tuple, system: _System) -> tuple:
    return h[0], tuple(im / s for im, s in zip(h[1], system.s, strict=True))


def _to_complex(pair: tuple, system: _System) -> tuple:
    return pair[0], tuple(s * w for s, w in zip(system.s, pair[1], strict=True))


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
    h: tuple,
    summaries: Any,
    jump: Any,
    hands_on: Any,
    place: Place,
    geometry: Geometry,
    *,
    backward: bool,
) -> tuple:
    """The complex state entering the place's split, from `h` at the row's near end."""
    order = geometry.order
    factor = _load_complex(jump, order, place.channels)
    count = geometry.splits - 1 - place.split if backward else place.split

    def body(i, h):
        # Summaries leave out the last split, or the first one if backward.
        index = geometry.splits - 2 - i if backward else i
        passed = index + 1 if backward else index
        added = _load_complex(summaries.at[place.row, index], order, place.channels)
        if hands_on is not None:
            keeps = hands_on[place.row, passed] == 1
            h = tuple(tuple(streams.select(keeps, v, jnp.zeros_like(v)) for v in p) for p in h)
        real, imag = [], []
        for n in range(order):
            real.append(added[0][n] + factor[0][n] * h[0][n] - factor[1][n] * h[1][n])
            imag.append(added[1][n] + factor[0][n] * h[1][n] + factor[1][n] * h[0][n])
        return tuple(real), tuple(imag)

    return lax.fori_loop(0, count, body, h)


def _borders_of(documents: tuple, place: Place, tile: Any, end: int | None) -> Borders:
    """Borders of a tile; its event is the row's first (0) or last (1) token, or none."""
    bits, ends = documents[:2]
    event = jnp.int32(-1)
    if end is not None:
        offset = ends[place.row, end] - tile * TILE
        event = jnp.where((offset >= 0) & (offset < TILE), offset, -1)
    return Borders(bits[place.row, tile, 0], bits[place.row, tile, 1], event)


def _run(
    documents: tuple | None,
    place: Place,
    step: Any,
    *,
    restart: Any,
    event: Any,
    end: int | None,
    backward: bool,
) -> Any:
    """A `run_tile` for `stream` that takes the slow way only through tiles with borders."""

    def run_tile(tile, read, written, carry):
        plain = partial(streams.walk, read, written, step=step, backward=backward)
        if documents is None:
            return plain(carry)
        borders = _borders_of(documents, place, tile, end)
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


def _enter_document(documents, initial, place, system, order):
    """What a document starts from: the carried state if it is the row's first, else zero."""

    def restart(tile, position, carry):
        if initial is None:
            return _zeros(order), _zeros(order)
        is_first = documents[1][place.row, 0] == tile * TILE + position
        h = _to_pair(_load_complex(initial.at[place.row], order, place.channels), system)
        return tuple(tuple(streams.select(is_first, v, jnp.zeros_like(v)) for v in p) for p in h)

    return restart


def _summary_kernel(*refs, geometry: Geometry, with_initial: bool, backward: bool):
    """What a split adds to the state after it, or before it if backward, from its tokens alone."""
    x, table, horizon, *refs = refs
    initial, refs = (refs[0], refs[1:]) if with_initial else (None, refs)
    documents, refs = (tuple(refs[:3]), refs[3:]) if geometry.packed else (None, refs)
    summaries, staged, barriers = refs
    order = geometry.order
    place = streams.find_place(geometry.tiles_per_split, geometry.tiles, 1 if backward else 0)
    # Tokens farther from the border than the horizon leave nothing there.
    count = jnp.minimum(place.count, horizon[lax.axis_index("d")])
    first = place.first if backward else place.first + place.count - count
    place = place._replace(first=first, count=count)
    system = _load_system(table, order, place.channels)

    def step(pair, tokens):
        return _advance(pair, tokens * order, system), []

    if backward:
        restart = lambda tile, position, pair: (_zeros(order), _zeros(order))  # noqa: E731
    else:
        restart = _enter_document(documents, initial, place, system, order)
    run = _run(
        documents,
        place,
        step,
        restart=restart,
        event=lambda pair: None,
        end=None,
        backward=backward,
    )
    start = _zeros(order), _zeros(order)
    pair = streams.stream(place, [(x, staged)], [], barriers, start, run, backward=backward)
    target = summaries.at[place.row, lax.axis_index("s")]
    _store_complex(target, place.channels, *_to_complex(pair, system))


def _output_kernel(*refs, geometry: Geometry, with_initial: bool):
    x, table, *refs = refs
    initial, refs = (refs[0], refs[1:]) if with_initial else (None, refs)
    (summaries, jump), refs = (refs[:2], refs[2:]) if geometry.splits > 1 else ((None, None), refs)
    documents, refs = (tuple(refs[:3]), refs[3:]) if geometry.packed else (None, refs)
    y, last, entering, xs, ys, barriers = refs
    order = geometry.order
    place = streams.find_place(geometry.tiles_per_split, geometry.tiles)
    channels = place.channels
    h = _zeros(order), _zeros(order)
    if initial is not None:
        h = _load_complex(initial.at[place.row], order, channels)
    if summaries is not None:
        hands_on = None if documents is None else documents[2]
        h = _fold(h, summaries, jump, hands_on, place, geometry, backward=False)
    _store_complex(entering.at[place.row, place.split], channels, *h)
    system = _load_system(table, order, channels)
    readers = _load_readers(table, system, order, channels)

    def step(pair, tokens):
        pair = _advance(pair, tokens * order, system)
        return pair, [_read_out(pair, tokens[0], readers)]

    def store_last(pair):
        _store_complex(last.at[place.row], channels, *_to_complex(pair, system))

    run = _run(
        documents,
        place,
        step,
        restart=_enter_document(documents, initial, place, system, order),
        event=store_last,
        end=1,
        backward=False,
    )
    sources, targets = [(x, xs)], [(y, ys)]
    pair = _to_pair(h, system)
    pair = streams.stream(place, sources, targets, barriers, pair, run, backward=False)
    if documents is None:
        pl.when(place.split == geometry.splits - 1)(partial(store_last, pair))
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


def _derivative(e: tuple, k: tuple, system: _System) -> tuple:
    """The complex k from its halves; also Σ x k, from Σ x e and the sums of the halves."""
    real = tuple(2.0 * m - w for m, w in zip(k[0], e[1], strict=True))
    return real, tuple(2.0 * s * v for s, v in zip(system.s, k[1], strict=True))


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


def _gradient_kernel(*refs, geometry: Geometry):
    x, dy, table, entering, *refs = refs
    (summaries, jump), refs = (refs[:2], refs[2:]) if geometry.splits > 1 else ((None, None), refs)
    documents, refs = (tuple(refs[:3]), refs[3:]) if geometry.packed else (None, refs)
    dx, x_e, x_k, x_dy, first_e, first_k, xs, dys, dxs, barriers = refs
    order = geometry.order
    place = streams.find_place(geometry.tiles_per_split, geometry.tiles)
    channels = place.channels
    e = _zeros(order), _zeros(order)
    if summaries is not None:
        hands_on = None if documents is None else documents[2]
        e = _fold(e, summaries, jump, hands_on, place, geometry, backward=True)
    system = _load_system(table, order, channels)
    readers = _load_readers(table, system, order, channels)
    e = _to_pair(e, system)
    zeros = _zeros(order), _zeros(order)
    # From zero, k = 0: the half m holds k and e_w together.
    carry = _Carry(e, (tuple(0.5 * w for w in e[1]), zeros[1]), zeros, zeros, zeros[0][0])

    def restart(tile, position, carry):
        return carry._replace(e=zeros, k=zeros)

    def store_first(carry):
        k = _derivative(carry.e, carry.k, system)
        _store_complex(first_e.at[place.row], channels, *_to_complex(carry.e, system))
        _store_complex(first_k.at[place.row], channels, *k)

    run = _run(
        documents,
        place,
        partial(_gradient_step, system=system, readers=readers),
        restart=restart,
        event=store_first,
        end=0,
        backward=True,
    )
    sources, targets = [(x, xs), (dy, dys)], [(dx, dxs)]
    carry = streams.stream(place, sources, targets, barriers, carry, run, backward=True)
    if documents is None:
        pl.when(place.split == 0)(partial(store_first, carry))
    h = _load_complex(entering.at[place.row, place.split], order, channels)
    total = _derivative(carry.x_e, carry.x_k, system)
    k = _derivative(carry.e, carry.k, system)
    total = _add_entering(total, h, k, table, order, channels)
    here = place.row, place.split
    _store_complex(x_e.at[here], channels, *_to_complex(carry.x_e, system))
    _store_complex(x_k.at[here], channels, *total)
    streams.store_rows(x_dy.at[here], 0, channels, [carry.x_dy])
    plgpu.wait_smem_to_gmem(0)


def _launch(kernel: Any, out_type: Any, grid: tuple, scratch: list, operands: list, interpret: Any):
    call = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=grid,
        grid_names=("d", "s", "b"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return call(*operands)


def _staged(dtype: Any) -> Any:
    return plgpu.SMEM((BUFFERS, TILE, CHANNELS), dtype)


def _per_channel(geometry: Geometry, *shape: int) -> jax.ShapeDtypeStruct:
    width = geometry.blocks * CHANNELS
    return jax.ShapeDtypeStruct((geometry.rows, *shape, width), jnp.float32)


def _summarize(x, tables, initial, documents, geometry, interpret, *, backward):
    operands = [x, tables.rows, tables.horizon]
    operands += [] if initial is None else [initial]
    operands += [] if documents is None else list(documents)
    barriers = plgpu.Barrier(num_arrivals=1, num_barriers=BUFFERS)
    return _launch(
        partial(
            _summary_kernel,
            geometry=geometry,
            with_initial=initial is not None,
            backward=backward,
        ),
        _per_channel(geometry, geometry.splits - 1, 2 * geometry.order),
        (geometry.blocks, geometry.splits - 1, geometry.rows),
        [_staged(x.dtype), barriers],
        operands,
        interpret,
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
    operands = [x, tables.rows]
    operands += [] if initial is None else [initial]
    if geometry.splits > 1:
        summaries = _summarize(x, tables, initial, documents, geometry, interpret, backward=False)
        operands += [summaries, tables.jump]
    operands += [] if documents is None else list(documents)
    barriers = plgpu.Barrier(num_arrivals=1, num_barriers=BUFFERS)
    return _launch(
        partial(_output_kernel, geometry=geometry, with_initial=initial is not None),
        [
            jax.ShapeDtypeStruct(x.shape, out_dtype),
            _per_channel(geometry, 2 * geometry.order),
            _per_channel(geometry, geometry.splits, 2 * geometry.order),
        ],
        (geometry.blocks, geometry.splits, geometry.rows),
        [_staged(x.dtype), _staged(out_dtype), barriers],
        operands,
        interpret,
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
    operands = [x, dy, tables.rows, entering]
    if geometry.splits > 1:
        summaries = _summarize(dy, tables, None, documents, geometry, interpret, backward=True)
        operands += [summaries, tables.jump]
    operands += [] if documents is None else list(documents)
    order = 2 * geometry.order
    sums = [_per_channel(geometry, geometry.splits, count) for count in (order, order, 1)]
    firsts = [_per_channel(geometry, order)] * 2
    barriers = plgpu.Barrier(num_arrivals=2, num_barriers=BUFFERS)
    results = _launch(
        partial(_gradient_kernel, geometry=geometry),
        [jax.ShapeDtypeStruct(x.shape, out_dtype), *sums, *firsts],
        (geometry.blocks, geometry.splits, geometry.rows),
        [_staged(x.dtype), _staged(dy.dtype), _staged(out_dtype), barriers],
        operands,
        interpret,
    )
    return Gradients(*results)
