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

from pallas_kernels.cema.mosaic_gpu import pipeline as streams
from pallas_kernels.cema.mosaic_gpu import recurrence as recurrence
from pallas_kernels.cema.mosaic_gpu.pipeline import CHANNELS, TILE, Borders, Place


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
      initial: the state before every row; backward, e after it, for the row's last split alone.
      summaries: what splits hand on; without the row's last split, backward without its first.
      entering: the state entering every split.
    """

    tables: Any
    documents: Any = None
    initial: Any = None
    summaries: Any = None
    entering: Any = None


def _find_horizon(tables: Any, place: Place) -> Any:
    """Tiles after which less than 2^-64 of any state is left: |q|^t <= exp(-(1 - |q|) t)."""
    tiles = 64 * math.log(2) / TILE / jnp.maximum(tables.damping[place.block], 2.0**-24)
    return tiles.astype(jnp.int32) + 1


def _fold(
    h: tuple, operands: _Operands, place: Place, geometry: Geometry, *, backward: bool
) -> tuple:
    """The complex state entering the place's split, from `h` at the row's near end."""
    if operands.summaries is None:
        return h
    order, tables = geometry.order, operands.tables
    factor = recurrence.load_complex(tables.rows.at[pl.ds(4, 2)], order, place.channels)
    count = geometry.splits - 1 - place.split if backward else place.split
    # What lies beyond the horizon has no part in it, not even h.
    near = lax.div(_find_horizon(tables, place), geometry.tiles_per_split) + 1
    skipped = jnp.maximum(count - near, 0)

    def keep_if(flag, h):
        return tuple(tuple(streams.select(flag, v, jnp.zeros_like(v)) for v in p) for p in h)

    def body(i, h):
        index = geometry.splits - 2 - i if backward else i
        passed = index + 1 if backward else index
        added = recurrence.load_complex(
            operands.summaries.at[place.row, index], order, place.channels
        )
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
    zeros = recurrence.zeros(order), recurrence.zeros(order)

    def restart(tile, position, carry):
        if operands.initial is None:
            return zeros
        is_first = operands.documents.ends[place.row, 0] == tile * TILE + position

        def carried():
            h = recurrence.load_complex(operands.initial.at[place.row], order, place.channels)
            return recurrence.to_pair(h, operands.tables, place.channels)

        return lax.cond(is_first, carried, lambda: zeros)

    return restart


def _summary_kernel(
    split, stage, x, operands, summaries, *, geometry: Geometry, first_split: int, backward: bool
):
    """What a split adds to the state after it, or before it if backward, from its tokens alone."""
    order = geometry.order
    zeros = recurrence.zeros(order), recurrence.zeros(order)
    place = geometry.find_place(split + first_split)
    # Tokens farther from the border than the horizon leave nothing there.
    count = jnp.minimum(place.count, _find_horizon(operands.tables, place))
    first = place.first if backward else place.first + place.count - count
    near = place._replace(first=first, count=count)
    load_system = partial(recurrence.load_system, operands.tables, order, place.channels)
    step = recurrence.forward_step(recurrence.square(load_system()), None, load_system)
    restart = _enter_document(operands, place, order)
    run = _run(operands, near, step, restart, tokens=2, backward=backward)
    pair = streams.stream(near, stage, [x], [], zeros, run, backward=backward)
    h = recurrence.to_complex(pair, operands.tables, place.channels)
    recurrence.store_complex(summaries.at[place.row, split], place.channels, h)


def _output_kernel(split, stage, x, operands, results, *, geometry: Geometry):
    y, last, entering = results
    order = geometry.order
    place = geometry.find_place(split)
    channels, tables = place.channels, operands.tables
    h = recurrence.zeros(order), recurrence.zeros(order)
    if operands.initial is not None:
        h = recurrence.load_complex(operands.initial.at[place.row], order, channels)
    h = _fold(h, operands, place, geometry, backward=False)
    if entering is not None:
        recurrence.store_complex(entering.at[place.row, split], channels, h)
    load_system = partial(recurrence.load_system, tables, order, channels)
    system = load_system()
    readers = recurrence.load_readers(tables, system, order, channels)
    step = recurrence.forward_step(recurrence.square(system), readers, load_system)

    def store_last(pair):
        recurrence.store_complex(
            last.at[place.row], channels, recurrence.to_complex(pair, tables, channels)
        )

    restart = _enter_document(operands, place, order)
    run = _run(operands, place, step, restart, tokens=2, event=store_last, end=1, backward=False)
    start = recurrence.to_pair(h, tables, channels)
    pair = streams.stream(place, stage, [x], [y], start, run, backward=False)
    if operands.documents is None:
        pl.when(split == geometry.splits - 1)(partial(store_last, pair))
    plgpu.wait_smem_to_gmem(0)


def _gradient_kernel(split, stage, x, dy, operands, results, *, geometry: Geometry):
    order, tables = geometry.order, operands.tables
    place = geometry.find_place(split)
    channels = place.channels
    zeros = recurrence.zeros(order), recurrence.zeros(order)
    e = _fold(zeros, operands, place, geometry, backward=True)
    if operands.initial is not None:
        after = recurrence.load_complex(operands.initial.at[place.row], order, channels)
        is_last = split == geometry.splits - 1
        e = jax.tree.map(partial(streams.select, is_last), after, e)
    system = recurrence.load_system(tables, order, channels)
    weights = recurrence.load_weights(tables, order, channels)
    e = recurrence.to_pair(e, tables, channels)
    # k = 0: the half m holds k and e_w together.
    k = tuple(0.5 * w for w in e[1]), zeros[1]

    def restart(tile, position, carry):
        return carry._replace(e=zeros, k=zeros)

    def store_first(carry):
        k = recurrence.derivative(carry.e, carry.k, tables, channels)
        recurrence.store_complex(
            results.first_e.at[place.row],
            channels,
            recurrence.to_complex(carry.e, tables, channels),
        )
        recurrence.store_complex(results.first_k.at[place.row], channels, k)

    step = partial(recurrence.gradient_step, system=system, weights=weights)
    run = _run(operands, place, step, restart, event=store_first, end=0, backward=True)
    carry = recurrence.Carry(e, k, zeros, zeros, zeros[0][0])
    carry = streams.stream(place, stage, [x, dy], [results.dx], carry, run, backward=True)
    if operands.documents is None:
        pl.when(split == 0)(partial(store_first, carry))
    h = recurrence.load_complex(operands.entering.at[place.row, split], order, channels)
    total = recurrence.derivative(carry.x_e, carry.x_k, tables, channels)
    k = recurrence.derivative(carry.e, carry.k, tables, channels)
    total = recurrence.add_entering(total, h, k, tables, channels)
    here = place.row, split
    recurrence.store_complex(
        results.x_e.at[here], channels, recurrence.to_complex(carry.x_e, tables, channels)
    )
    recurrence.store_complex(results.x_k.at[here], channels, total)
    results.x_dy[*here, channels] = carry.x_dy
    plgpu.wait_smem_to_gmem(0)


def _per_channel(geometry: Geometry, *shape: int) -> jax.ShapeDtypeStruct:
    width = geometry.blocks * CHANNELS
    return jax.ShapeDtypeStruct((geometry.rows, *shape, width), jnp.float32)


def _summarize(x, operands: _Operands, geometry: Geometry, interpret, *, backward) -> Array | None:
    """Of the splits that hand something to another one of the row."""
    if geometry.splits == 1:
        return None
    # Backward, the row's first split has nobody to hand anything to.
    splits = range(int(backward), geometry.splits - 1 + int(backward))
    return _launch_summaries(x, operands, geometry, splits, interpret, backward=backward)


def _launch_summaries(
    x, operands: _Operands, geometry: Geometry, splits: range, interpret, *, backward
) -> Array:
    return streams.launch(
        partial(_summary_kernel, geometry=geometry, first_split=splits.start, backward=backward),
        (x, operands),
        _per_channel(geometry, len(splits), 2, geometry.order),
        name="cema_summaries",
        grid=(geometry.blocks, len(splits), geometry.rows),
        staged=[x.dtype],
        arrivals=1,
        interpret=interpret,
    )


def summarize_splits(
    x: Float[Array, "B L D"],
    tables: Tables,
    documents: Documents | None,
    geometry: Geometry,
    *,
    backward: bool,
    interpret: Any,
) -> Float[Array, "B S 2 N D"]:
    """What every split adds to the state after it, in units of p, from its tokens alone.

    With `backward`, x is dy, and it is e at the split's first token.
    """
    operands = _Operands(tables, documents)
    splits = range(geometry.splits)
    return _launch_summaries(x, operands, geometry, splits, interpret, backward=backward)


def run_forward(
    x: Float[Array, "B L D"],
    tables: Tables,
    initial: Float[Array, "B 2 N D"] | None,
    documents: Documents | None,
    geometry: Geometry,
    *,
    out_dtype: Any,
    with_entering: bool,
    interpret: Any,
    summaries: Float[Array, "B S 2 N D"] | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B 2 N D"], Float[Array, "B S 2 N D"] | None]:
    """y, the last state of every row and the state entering every split, states in units of p.

    The last state of a packed row without tokens is undefined. `summaries` are those of
    `summarize_splits`, if they are known.
    """
    entering = _per_channel(geometry, geometry.splits, 2, geometry.order)
    operands = _Operands(tables, documents, initial)
    if summaries is None:
        summaries = _summarize(x, operands, geometry, interpret, backward=False)
    return streams.launch(
        partial(_output_kernel, geometry=geometry),
        (x, operands._replace(summaries=summaries)),
        (
            jax.ShapeDtypeStruct(x.shape, out_dtype),
            _per_channel(geometry, 2, geometry.order),
            entering if with_entering else None,
        ),
        name="cema_outputs",
        grid=(geometry.blocks, geometry.splits, geometry.rows),
        staged=[x.dtype, out_dtype],
        arrivals=1,
        interpret=interpret,
    )


class Gradients(NamedTuple):
    """Results of the backward pass, or their shapes.

    Attributes:
      dx: gradient of x.
      x_e: Σ x e of every split.
      x_k: Σ x k of every split, with q h k of its first token.
      x_dy: Σ x dy of every split.
      first_e: e at the row's first token; undefined in a packed row without tokens.
      first_k: k at the row's first token, from the end of its split.
    """

    dx: Any  # (B L D)
    x_e: Any  # (B S 2 N D)
    x_k: Any  # (B S 2 N D)
    x_dy: Any  # (B S D)
    first_e: Any  # (B 2 N D)
    first_k: Any  # (B 2 N D)


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
    after: Float[Array, "B 2 N D"] | None = None,
    summaries: Float[Array, "B S 2 N D"] | None = None,
) -> Gradients:
    """Gradients of Σ y dy from the states that `run_forward` found to enter the splits.

    `after` is e at the token after every row, if the row goes on elsewhere; `summaries` are those
    of `summarize_splits`, if they are known, with what `after` leaves of the last split in it.
    """
    operands = _Operands(tables, documents)
    if summaries is None:
        summaries = _summarize(dy, operands, geometry, interpret, backward=True)
    else:
        summaries = summaries[:, 1:] if geometry.splits > 1 else None
    operands = operands._replace(initial=after)
    order, splits = geometry.order, geometry.splits
    shapes = Gradients(
        jax.ShapeDtypeStruct(x.shape, out_dtype),
        x_e=_per_channel(geometry, splits, 2, order),
        x_k=_per_channel(geometry, splits, 2, order),
        x_dy=_per_channel(geometry, splits),
        first_e=_per_channel(geometry, 2, order),
        first_k=_per_channel(geometry, 2, order),
    )
    return streams.launch(
        partial(_gradient_kernel, geometry=geometry),
        (x, dy, operands._replace(summaries=summaries, entering=entering)),
        shapes,
        name="cema_gradients",
        grid=(geometry.blocks, splits, geometry.rows),
        staged=[x.dtype, dy.dtype, out_dtype],
        arrivals=2,
        interpret=interpret,
    )
