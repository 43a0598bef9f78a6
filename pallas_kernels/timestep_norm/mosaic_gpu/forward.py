"""TimestepNorm on Hopper: four kernels, each of which reads a split of a row once.

    tsn_moments   count, mean and squares of what a split hands on to the next one
    tsn_outputs   y, and per token pivot k, offset a = m - k and r = (v + eps)^(-1/2)
    tsn_slopes    what a split hands on to the one before it
    tsn_gradients dx, and by block the gradients of scale, bias and of what documents start from

A tile takes three steps: sums over the features of each token, the running sums over its tokens,
and the results. Between them the numbers of a token move from four threads to one and back.

Backward, with u and s as in README.md and q_t = u_t - 2 a_t s_t, the two running sums

    S_i = Σ_{t≥i} s_t        T_i = Σ_{t≥i} q_t        dx_i = g_i r_i + (T_i + 2 (x_i - k) S_i) / F

are README's, taken around the pivot. Read around another one, T changes by 2 (k' - k) S.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int32

from pallas_kernels.timestep_norm.mosaic_gpu import pipeline as tiles
from pallas_kernels.timestep_norm.mosaic_gpu.pipeline import (
    BUFFERS,
    HALF,
    LANES,
    ROWS,
    TOKENS,
    Array,
    Geometry,
    Place,
    Stage,
)

HALVES = TOKENS // HALF
# Flags of a token. A document is the row's first one or a later one.
VALID, STARTS, LATER, TAIL, HEAD = 1, 2, 4, 8, 16


class Documents(NamedTuple):
    """What packed rows are.

    Attributes:
      tokens: for every tile and token: count after it, tokens since its document's first, tokens
        to its document's last, and flags: VALID if it is not padding; STARTS at a document's first
        token; LATER in all documents but the row's first; TAIL if no document of its split starts
        after it; HEAD if its document started before its split, or is the row's first.
      starts: whether a document starts in a tile, 0 or 1.
      initial: mean and count times variance that the row's first document starts from, then those
        of later ones.
      has_initial: whether there are such, 0 or 1.
    """

    tokens: Int32[jax.Array, "B tiles 4 128"]
    starts: Int32[jax.Array, "B tiles"]
    initial: Float[jax.Array, "B G 4"]
    has_initial: Int32[jax.Array, "B 2"]


class Inputs(NamedTuple):
    """What kernels read; None what a call has not.

    Attributes:
      x: the sequence, with groups of `width`.
      scale: scale.
      documents: of packed rows.
      count: tokens before the row, of rows that are not packed.
      bias: bias.
      entering: of every split: pivot, sum around it, squares; backward the sums S, T that enter.
      dy: cotangent of y.
      kept: for every tile and token a, r, and k if packed.
      pivots: k of every split if not packed.
    """

    x: Any
    documents: Documents | None
    count: Any
    scale: Any = None
    bias: Any = None
    entering: Any = None
    dy: Any = None
    kept: Any = None
    pivots: Any = None


class Memory(NamedTuple):
    """Shared memory; `tokens` and `stats` have a number of each token for every group."""

    stage: Stage
    sums: Any
    stats: Any
    tokens: Any


def make_memory(geometry: Geometry, read: list[Any], written: list[Any], copies: int, sums: int):
    return Memory(
        Stage(read, written, plgpu.Barrier(num_arrivals=copies, num_barriers=BUFFERS)),
        tiles.sums_memory(sums) if sums else None,
        plgpu.SMEM((geometry.together, 4, TOKENS), jnp.float32),
        plgpu.SMEM((geometry.together, 4, TOKENS), jnp.float32),
    )


def documents_memory(documents: Documents | None) -> list[Any]:
    return [] if documents is None else [plgpu.SMEM((BUFFERS, 1, 4, TOKENS), jnp.int32)]


def spread(scalar: Any, shape: tuple[int, ...] = (TOKENS,), layout: Any = LANES) -> Array:
    """The same number for all tokens."""
    return plgpu.layout_cast(jnp.broadcast_to(jnp.float32(scalar), shape), layout)


def has(flags: Any, flag: int) -> Any:
    return (flags & flag) != 0


def _group_moments(v: Array, geometry: Geometry) -> list[tuple[Array, Array, Array]]:
    """Mean of a token's numbers, what its rounding lost, and their variance, for every group."""
    each, width = 1 / geometry.features, geometry.width

    def average(values):
        return [total * each for total in tiles.sum_groups(values, width)]

    means = average(v)
    deviation = v - tiles.over_columns(means, width)
    if geometry.features < width:
        column = plgpu.broadcasted_iota(jnp.int32, v.shape, 1, layout=plgpu.Layout.WGMMA)
        is_real = jax.lax.rem(column, width) < geometry.features
        deviation = jnp.where(is_real, deviation, jnp.zeros_like(deviation))
    rests, squares = average(deviation), average(deviation * deviation)
    return [
        (mean, rest, jnp.maximum(square - rest * rest, 0.0))
        for mean, rest, square in zip(means, rests, squares, strict=True)
    ]


def find_sources(inputs: Inputs, place: Place, *arrays: Any):
    """What is copied for a tile: tiles of the arrays, then `kept`, then of documents."""

    def find(tile):
        parts = [[place.window(array, tile)] for array in arrays]
        if inputs.kept is not None:
            parts.append([inputs.kept.at[place.row, group, tile] for group in place.groups])
        if inputs.documents is not None:
            parts.append([inputs.documents.tokens.at[place.row, tile]])
        return parts

    return find


def no_targets(tile):
    return []


class _RowMoments(NamedTuple):
    """Moments of every 128th token: pivot, offset of the mean from it, squares around the mean."""

    pivot: Array
    offset: Array
    squares: Array


def _add_token(moments: _RowMoments, count: Array, token: tuple, keep: Array | None) -> _RowMoments:
    mean, rest, var = token
    after = count + 1.0
    pivot = jnp.where(count > 0.0, moments.pivot, mean)
    delta = ((mean - pivot) + rest) - moments.offset
    new = _RowMoments(
        pivot,
        moments.offset + delta / after,
        moments.squares + var + delta * delta * (count / after),
    )
    if keep is None:
        return new
    return _RowMoments(*(jnp.where(keep, a, b) for a, b in zip(new, moments, strict=True)))


def moments_kernel(inputs: Inputs, results: Any, memory: Memory, *, geometry: Geometry):
    """Writes what every split but the last hands on: count, pivot, offset of the mean, squares."""
    place = tiles.find_place(geometry)
    zero = tiles.fill((HALF,), ROWS)
    start = [[_RowMoments(zero, zero, zero)] * HALVES] * geometry.together

    def run_tile(tile, read, written, carry):
        counts, moments = carry
        new_counts, new_moments = [], [[] for _ in moments]
        for half in range(HALVES):
            keep = None
            if inputs.documents is not None:
                flags = tiles.load_rows(read[1].at[0, 3], half)
                keep = has(flags, VALID) & has(flags, TAIL)
            found = _group_moments(tiles.load_half(read[0], half), geometry)
            for i, token in enumerate(found):
                new_moments[i].append(_add_token(moments[i][half], counts[half], token, keep))
            after = counts[half] + 1.0
            new_counts.append(after if keep is None else jnp.where(keep, after, counts[half]))
        return new_counts, new_moments

    # Backward, so that the next kernel finds where it begins in the L2 cache.
    counts, moments = tiles.stream(
        place,
        memory.stage,
        find_sources(inputs, place, inputs.x),
        no_targets,
        ([zero] * HALVES, start),
        run_tile,
        backward=True,
    )
    for i in range(geometry.together):
        for half in range(HALVES):
            for j, value in enumerate((counts[half], *moments[i][half])):
                memory.stats[i, j, pl.ds(half * HALF, HALF)] = value
    tiles.meet()
    for i, group in enumerate(place.groups):
        count, pivot, offset, squares = (tiles.load_lanes(memory.stats.at[i, j]) for j in range(4))
        total = count.sum()
        each = 1.0 / jnp.maximum(total, 1.0)
        middle = (count * (pivot + offset)).sum() * each
        away = (pivot - spread(middle)) + offset
        mean = (count * away).sum() * each
        away = away - spread(mean)
        squares = (squares + count * (away * away)).sum()
        for j, value in enumerate((total, middle, mean, squares)):
            results[place.row, place.split, group, j] = value


class _Carry(NamedTuple):
    """What a tile hands on, forward: pivot, sum around it, squares. Scalars."""

    pivot: Any
    total: Any
    squares: Any


class Tokens(NamedTuple):
    """What a tile's tokens are; None what a row without documents has not."""

    count: Array
    left: Array | None
    right: Array | None
    flags: Array | None


def find_tokens(inputs: Inputs, place: Place, tile: Any, read: list[Any]) -> Tokens:
    if inputs.documents is None:
        index = tiles.lane_index() + (inputs.count[place.row] + tile * TOKENS + 1)
        return Tokens(index.astype(jnp.float32), None, None, None)
    count, left, right, flags = (tiles.load_lanes(read[-1].at[0, j]) for j in range(4))
    return Tokens(jnp.maximum(count.astype(jnp.float32), 1.0), left, right, flags)


def _start_documents(
    documents: Documents, place: Place, tile: Any, tokens: Tokens, means: list[Array], sums: Any
) -> list[tuple[Array, Array]]:
    """Pivot and squares that the documents that start in this tile start from, for every group."""
    later = has(tokens.flags, LATER)
    exists = [
        spread(documents.has_initial[place.row, j].astype(jnp.float32)) > 0.5 for j in range(2)
    ]
    zero = tiles.fill((TOKENS,), LANES)

    def find_first():
        at_start = [jnp.where(has(tokens.flags, STARTS), mean, zero) for mean in means]
        return tiles.running_sums(sums, at_start, tokens.left, backward=False)

    some = documents.starts[place.row, tile] != 0
    firsts = jax.lax.cond(some, find_first, lambda: [zero for _ in means])
    found = []
    for group, first in zip(place.groups, firsts, strict=True):
        parts = [spread(documents.initial[place.row, group, j]) for j in range(4)]
        pivot = jnp.where(
            later, jnp.where(exists[1], parts[2], first), jnp.where(exists[0], parts[0], first)
        )
        found.append((pivot, jnp.where(later, parts[3], parts[1])))
    return found


class _Advanced(NamedTuple):
    """Of every token of a tile: k, a, r, and the sums that are handed on."""

    pivot: Array
    offset: Array
    rstd: Array
    total: Array
    squares: Array


def _advance(
    inputs: Inputs,
    place: Place,
    tile: Any,
    tokens: Tokens,
    memory: Memory,
    carries: list[_Carry],
    eps: float,
) -> list[_Advanced]:
    """The running moments of every group."""
    means, rests, variances = (
        [tiles.load_lanes(memory.stats.at[i, j]) for i in range(len(carries))] for j in range(3)
    )
    each = 1.0 / tokens.count
    before = tokens.count - 1.0
    each_before, share = 1.0 / jnp.maximum(before, 1.0), before * each
    starts = [_Carry(*(spread(value) for value in carry)) for carry in carries]
    valid, zero = None, jnp.zeros_like(means[0])
    if inputs.documents is not None:
        goes_on = tokens.left > tiles.lane_index()
        valid = has(tokens.flags, VALID)
        own = _start_documents(inputs.documents, place, tile, tokens, means, memory.sums)
        starts = [
            _Carry(
                jnp.where(goes_on, carry.pivot, pivot),
                jnp.where(goes_on, carry.total, zero),
                jnp.where(goes_on, carry.squares, squares),
            )
            for carry, (pivot, squares) in zip(starts, own, strict=True)
        ]

    def add_up(values):
        if valid is not None:
            values = [jnp.where(valid, value, zero) for value in values]
        return values, tiles.running_sums(memory.sums, values, tokens.left, backward=False)

    differences, added = add_up(
        [(mean - c.pivot) + rest for mean, rest, c in zip(means, rests, starts, strict=True)]
    )
    totals = [c.total + more for c, more in zip(starts, added, strict=True)]
    summands = []
    for difference, total, var in zip(differences, totals, variances, strict=True):
        moved = difference - (total - difference) * each_before
        summands.append(var + moved * moved * share)
    _, added = add_up(summands)
    found = []
    for start, total, more in zip(starts, totals, added, strict=True):
        squares = start.squares + more
        rstd = jax.lax.rsqrt(squares * each + eps)
        found.append(_Advanced(start.pivot, total * each, rstd, total, squares))
    return found


class Outputs(NamedTuple):
    """Results of `tsn_outputs`, or their shapes; None what was not asked for.

    Attributes:
      y: normalized.
      last: mean and variance after each token of the row's last tile.
      kept: for the backward pass; see `Inputs`.
      pivots: likewise.
    """

    y: Any
    last: Any  # (B G 2 128)
    kept: Any
    pivots: Any


class _OutputsBlock(NamedTuple):
    """A warpgroup of `tsn_outputs`."""

    inputs: Inputs
    results: Outputs
    memory: Memory
    geometry: Geometry
    eps: float
    place: Place
    scale: Array
    bias: Array

    @property
    def packed(self) -> bool:
        return self.inputs.documents is not None

    def run_tile(self, tile, read, written, carries: list[_Carry]) -> list[_Carry]:
        memory, groups = self.memory, range(self.geometry.together)
        for half in range(HALVES):
            rows = pl.ds(half * HALF, HALF)
            moments = _group_moments(tiles.load_half(read[0], half), self.geometry)
            for i, values in enumerate(moments):
                for j, value in enumerate(values):
                    memory.stats[i, j, rows] = value
        tokens = find_tokens(self.inputs, self.place, tile, read)
        tiles.meet()
        if not self.packed:
            carries = [self.find_pivot(carries[i], i, tile) for i in groups]
        found = _advance(self.inputs, self.place, tile, tokens, memory, carries, self.eps)
        for i in groups:
            self.store_tokens(i, tile, tokens, found[i])
        tiles.meet()
        for half in range(HALVES):
            y = self.normalize(tiles.load_half(read[0], half), half)
            written[0][0, pl.ds(half * HALF, HALF)] = y.astype(written[0].dtype)
        last = TOKENS - 1
        return [
            _Carry(memory.tokens[i, 0, last], memory.stats[i, 0, last], memory.stats[i, 1, last])
            for i in groups
        ]

    def find_pivot(self, carry: _Carry, i: int, tile: Any) -> _Carry:
        """The row's first token is the pivot where there is no state."""
        place = self.place
        is_first = (self.inputs.count[place.row] == 0) & (tile == 0)
        pivot = jnp.where(is_first, self.memory.stats[i, 0, 0], carry.pivot)
        if self.results.pivots is not None:
            self.results.pivots[place.row, place.split, place.groups[i]] = pivot
        return carry._replace(pivot=pivot)

    def store_tokens(self, i: int, tile: Any, tokens: Tokens, found: _Advanced) -> None:
        results, everyone = self.results, pl.ds(0, TOKENS)
        row, group = self.place.row, self.place.groups[i]
        for j, value in enumerate(found[:3]):
            self.memory.tokens[i, j, everyone] = value
        # Read back as scalars, the last token's.
        self.memory.stats[i, 0, everyone] = found.total
        self.memory.stats[i, 1, everyone] = found.squares
        if self.packed:
            one = jnp.ones_like(found.rstd)
            valid = jnp.where(has(tokens.flags, VALID), one, jnp.zeros_like(one))
            self.memory.tokens[i, 3, everyone] = valid
        if results.kept is not None:
            kept = (found.offset, found.rstd, found.pivot)[: 3 if self.packed else 2]
            for j, value in enumerate(kept):
                results.kept[row, group, tile, j, everyone] = value

        @pl.when(tile == self.geometry.tiles - 1)
        def _():
            results.last[row, group, 0, everyone] = found.pivot + found.offset
            results.last[row, group, 1, everyone] = found.squares / tokens.count

    def normalize(self, v: Array, half: int) -> Array:
        k, a, r, *valid = (
            tiles.over_columns(
                [
                    tiles.load_rows(self.memory.tokens.at[i, j], half)
                    for i in range(self.geometry.together)
                ],
                self.geometry.width,
            )
            for j in range(4 if self.packed else 3)
        )
        y = ((v - k) - a) * r * tiles.over_rows(self.scale) + tiles.over_rows(self.bias)
        return jnp.where(valid[0] > 0.5, y, jnp.zeros_like(y)) if valid else y


def outputs_kernel(
    inputs: Inputs, results: Outputs, memory: Memory, *, geometry: Geometry, eps: float
):
    """Writes y and what the backward pass needs."""
    place = tiles.find_place(geometry)
    tiles.clear(memory.sums)
    scale, bias = (tiles.load_columns(a, place.columns) for a in (inputs.scale, inputs.bias))
    block = _OutputsBlock(inputs, results, memory, geometry, eps, place, scale, bias)
    start = [
        _Carry(*(inputs.entering[place.row, place.split, group, j] for j in range(3)))
        for group in place.groups
    ]
    tiles.stream(
        place,
        memory.stage,
        find_sources(inputs, place, inputs.x),
        lambda tile: [[place.window(results.y, tile)]],
        start,
        block.run_tile,
        backward=False,
    )
