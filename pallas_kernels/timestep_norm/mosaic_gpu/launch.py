"""TimestepNorm's Hopper kernels on rows: documents, what splits hand on, gradients from sums.

README.md derives the sums, `mosaic_gpu_kernels` says what the kernels do.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.common.residuals import name_residuals
from pallas_kernels.timestep_norm.mosaic_gpu import pipeline as tiles
from pallas_kernels.timestep_norm.mosaic_gpu.backward import (
    Gradients,
    gradients_kernel,
    slopes_kernel,
)
from pallas_kernels.timestep_norm.mosaic_gpu.forward import (
    HEAD,
    LATER,
    STARTS,
    TAIL,
    VALID,
    Documents,
    Inputs,
    Outputs,
    documents_memory,
    make_memory,
    moments_kernel,
    outputs_kernel,
)
from pallas_kernels.timestep_norm.mosaic_gpu.pipeline import TOKENS, Geometry, staged
from pallas_kernels.timestep_norm.types import document_starts


class Options(NamedTuple):
    eps: float
    geometry: Geometry
    interpret: Any


class Links(NamedTuple):
    """Which splits hand what on to which, in packed rows.

    Attributes:
      forward: split j belongs to the document that split s - 1 ends in.
      later: that document is not the row's first.
      backward: split j > s begins in the document that split s ends in; after those, whether the
        row ends in it.
      first: split s begins in the row's first document; after those, whether the row ends in it.
      last: split s ends in the row's last document.
    """

    forward: Bool[Array, "B S J"]
    later: Bool[Array, "B S"]
    backward: Bool[Array, "B S J+1"]
    first: Bool[Array, "B S+1"]
    last: Bool[Array, "B S"]


class Rows(NamedTuple):
    """Where tokens stand; None what rows without documents have not.

    Attributes:
      state_count: tokens before the row.
      prior_count: tokens before every other document.
      last_count: tokens after the row.
      tokens: see `Documents`.
      some: whether a row has tokens at all.
      links: what splits hand on.
    """

    state_count: Int32[Array, " B"]
    prior_count: Int32[Array, ""]
    last_count: Int32[Array, " B"]
    tokens: Int32[Array, "B tiles 4 128"] | None
    some: Bool[Array, " B"] | None
    links: Links | None


Pair = tuple[Float[Array, "*B G"], Float[Array, "*B G"]]


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    x: Array
    scale: Array
    bias: Array
    rows: Rows
    documents: Documents | None
    entering: Array
    last_mean: Array
    tokens: Array
    pivots: Array | None


def find_rows(
    geometry: Geometry,
    state_count: Array,
    prior_count: Array,
    segment_ids: Array | None,
    length: int,
) -> Rows:
    """Where the tokens of rows stand; `length` is without what fills the last tile."""
    if segment_ids is None:
        return Rows(state_count, prior_count, state_count + length, None, None, None)
    L = segment_ids.shape[1]
    splits, split = geometry.splits, geometry.tiles_per_split * TOKENS
    index = jnp.arange(L, dtype=jnp.int32)
    starts, valid = document_starts(segment_ids), segment_ids != 0
    ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    later = jnp.cumsum(starts, axis=1) > 1
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, index, L - 1), axis=1, reverse=True)
    tokens = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    before = jax.lax.cummax(jnp.where(starts, tokens - 1, 0), axis=1)
    count = jnp.where(later, prior_count, state_count[:, None]) + tokens - before
    split_start = index // split * split
    flags = (
        valid * VALID
        + starts * STARTS
        + later * LATER
        + (last >= jnp.minimum(split_start + split, L) - 1) * TAIL
        + ((first < split_start) | ~later) * HEAD
    )
    # The row's last document goes on to the state after it.
    right = last - index + (last == L - 1)
    arrays = jnp.stack([count, index - first, right, flags.astype(jnp.int32)], axis=1)
    arrays = jnp.swapaxes(arrays.reshape(arrays.shape[0], 4, -1, TOKENS), 1, 2)
    number = jnp.arange(splits, dtype=jnp.int32)
    ending = first[:, split - 1 :: split][:, : splits - 1]  # of every split but the last
    beginning = jnp.concatenate([first[:, split::split], first[:, -1:]], axis=1)
    is_before = number[None, :-1] < number[:, None]
    begins = jnp.pad(ending // split, ((0, 0), (1, 0)))
    links = Links(
        forward=is_before & (number[:-1] >= begins[:, :, None]),
        later=jnp.pad(later[:, split - 1 :: split][:, : splits - 1], ((0, 0), (1, 0))),
        backward=beginning[:, None, :] <= (number[:, None] + 1) * split - 1,
        first=~jnp.concatenate([later[:, ::split], later[:, -1:]], axis=1),
        last=number >= first[:, -1:] // split,
    )
    return Rows(state_count, prior_count, count[:, -1], arrays, valid.any(axis=1), links)


def describe_documents(rows: Rows, state: Pair, prior: Pair) -> Documents | None:
    """What the kernels know of packed rows; None without documents."""
    if rows.tokens is None:
        return None
    counts = (rows.state_count, jnp.broadcast_to(rows.prior_count, rows.state_count.shape))
    counts = jnp.stack(counts, axis=1)
    moments = [(state[0], state[1]), tuple(jnp.broadcast_to(p, state[0].shape) for p in prior)]
    parts = [
        part
        for j, (mean, var) in enumerate(moments)
        for part in (mean, counts[:, j : j + 1].astype(mean.dtype) * var)
    ]
    has_initial = (counts > 0).astype(jnp.int32)
    starts = (rows.tokens[:, :, 3] & STARTS).max(axis=-1)
    return Documents(rows.tokens, starts, jnp.stack(parts, axis=-1), has_initial)


def forward(
    options: Options,
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    state: Pair,
    prior: Pair,
    rows: Rows,
    *,
    with_kept: bool,
    summaries: Float[Array, "B S G 4"] | None = None,
) -> tuple[tuple[Array, Array, Array], Kept]:
    """y, mean and variance after every row; `summaries` of all splits, if they are known."""
    geometry = options.geometry
    documents = describe_documents(rows, state, prior)
    inputs = Inputs(x, documents, rows.state_count, scale, bias)
    if geometry.splits == 1:
        summaries = None
    elif summaries is None:
        summaries = run_moments(options, inputs, geometry.splits - 1)
    else:
        summaries = summaries[:, :-1]
    entering = _enter(summaries, state, prior, rows, geometry)
    out = _run_outputs(options, inputs._replace(entering=entering), with_kept=with_kept)
    entering, out = name_residuals((entering, out), "timestep_norm")
    mean, var = out.last[:, :, 0, -1], out.last[:, :, 1, -1]
    kept = Kept(x, scale, bias, rows, documents, entering, mean, out.kept, out.pivots)
    if rows.some is not None:
        mean = jnp.where(rows.some[:, None], mean, state[0])
        var = jnp.where(rows.some[:, None], var, state[1])
    return (out.y, mean, var), kept


def inputs_backward(kept: Kept, dy: Float[Array, "B L D"]) -> Inputs:
    """What the kernels of the backward pass read."""
    return Inputs(
        kept.x, kept.documents, kept.rows.state_count, kept.scale, dy=dy, kept=kept.tokens,
        pivots=kept.pivots,
    )  # fmt: skip


def backward(
    options: Options,
    kept: Kept,
    cotangents: tuple[Array, Array, Array],
    *,
    slopes: Float[Array, "B S G 2"] | None = None,
) -> tuple[Array, Array, Array, Pair, Pair, None]:
    """Gradients of `forward`'s array arguments; `slopes` of all splits, if they are known."""
    dy, d_mean, d_var = cotangents
    rows, geometry = kept.rows, options.geometry
    inputs = inputs_backward(kept, dy)
    if geometry.splits == 1:
        slopes = None
    elif slopes is None:
        slopes = run_slopes(options, inputs, first_split=1)
    else:
        slopes = slopes[:, 1:]
    entering = _enter_backward(slopes, d_mean, d_var, kept, geometry)
    out = _run_gradients(options, inputs._replace(entering=entering))
    affine = out.affine.sum(axis=(0, 1))
    state_count = rows.state_count[:, None].astype(jnp.float32)

    if rows.some is None:
        s, t = out.initial[:, 0, :, 0], out.initial[:, 0, :, 1]
        d_state = times(state_count, t), times(state_count, s)
        d_prior = jnp.zeros_like(s[0]), jnp.zeros_like(s[0])
    else:
        s, t, later_s, later_t = (out.initial[..., j].sum(axis=1) for j in range(4))
        none = ~rows.some[:, None]
        d_state = (
            times(state_count, t) + jnp.where(none, d_mean, 0),
            times(state_count, s) + jnp.where(none, d_var, 0),
        )
        prior_count = rows.prior_count.astype(jnp.float32)
        d_prior = times(prior_count, later_t.sum(0)), times(prior_count, later_s.sum(0))
    return out.dx, affine[0], affine[1], d_state, d_prior, None


def _enter(
    summaries: Float[Array, "B J G 4"] | None,
    state: Pair,
    prior: Pair,
    rows: Rows,
    geometry: Geometry,
) -> Float[Array, "B S G 3"]:
    """Pivot, sum around it and squares that every split starts from.

    The document that the split before ended in: what it started from, and its tokens in all splits.
    """
    number = jnp.arange(geometry.splits)
    count = rows.state_count[:, None, None].astype(jnp.float32)
    mean, var = (jnp.broadcast_to(s[:, None], (s.shape[0], 1, s.shape[1])) for s in state)
    is_linked = (number[:-1] < number[:, None])[None]
    if rows.links is not None:
        later = rows.links.later[..., None]
        count = jnp.where(later, rows.prior_count.astype(jnp.float32), count)
        mean, var = jnp.where(later, prior[0], mean), jnp.where(later, prior[1], var)
        is_linked = rows.links.forward
    if summaries is None:
        return jnp.stack([mean, jnp.zeros_like(mean), count * var], axis=-1)
    _, pivot, sums, squares = merge_splits(count, mean, var, summaries, is_linked)
    return jnp.stack([pivot, sums, squares], axis=-1)


def merge_splits(
    count: Float[Array, "B T 1"],
    mean: Float[Array, "B T G"],
    var: Float[Array, "B T G"],
    summaries: Float[Array, "B J G 4"],
    is_linked: Bool[Array, "B T J"],
) -> tuple[Array, Array, Array, Array]:
    """Tokens, pivot, sum around it and squares of each T: what it had, and its splits (Chan)."""
    # (B, T, J, G): T gets from split J.
    linked = is_linked[..., None]
    n, middle, offset, squares = (summaries[:, None, ..., j] for j in range(4))

    def total(values):
        return jnp.where(linked, values, 0).sum(axis=2)

    all_tokens = count + total(n)
    each = 1 / jnp.maximum(all_tokens, 1)
    pivot = (count * mean + total(n * (middle + offset))) * each
    pivot = jnp.where(all_tokens == count, mean, pivot)
    away = (middle - pivot[:, :, None]) + offset
    sums = count * (mean - pivot) + total(n * away)
    center = sums * each
    squares = count * (var + jnp.square(mean - pivot - center)) + total(
        squares + n * jnp.square(away - center[:, :, None])
    )
    return all_tokens, pivot, sums, squares


def _enter_backward(
    slopes: Float[Array, "B J G 2"] | None,
    d_mean: Float[Array, "B G"],
    d_var: Float[Array, "B G"],
    kept: Kept,
    geometry: Geometry,
) -> Float[Array, "B S G 2"]:
    """S and T that every split starts from: of later splits, and of the final state."""
    per_split = geometry.tiles_per_split
    if kept.pivots is not None:
        pivot = kept.pivots
    else:
        last_tiles = kept.tokens[:, :, per_split - 1 :: per_split, 2, -1]
        if last_tiles.shape[2] < geometry.splits:
            last_tiles = jnp.concatenate([last_tiles, kept.tokens[:, :, -1:, 2, -1]], axis=2)
        pivot = jnp.swapaxes(last_tiles, 1, 2)
    s, t = slopes_at_end(pivot, d_mean, d_var, kept)
    if slopes is None:
        return jnp.stack([s, t], axis=-1)
    number = jnp.arange(geometry.splits)
    is_linked = (number[:, None] < number[1:])[None]
    if kept.rows.links is not None:
        is_linked = is_linked & kept.rows.links.backward[..., :-1]
        reaches_end = kept.rows.links.backward[..., -1:]
        s, t = jnp.where(reaches_end, s, 0), jnp.where(reaches_end, t, 0)
    sums = add_slopes((s, t), pivot, slopes, kept.entering[:, 1:, :, 0], is_linked)
    return jnp.stack(sums, axis=-1)


def slopes_at_end(
    pivot: Float[Array, "B T G"],
    d_mean: Float[Array, "B G"],
    d_var: Float[Array, "B G"],
    kept: Kept,
) -> tuple[Float[Array, "B T G"], Float[Array, "B T G"]]:
    """S and T, around each pivot, of the gradients of the row's last moments."""
    each = 1 / jnp.maximum(kept.rows.last_count, 1).astype(jnp.float32)[:, None, None]
    s, mean = d_var[:, None] * each, kept.last_mean[:, None]
    t = d_mean[:, None] * each - 2 * (mean - pivot) * s
    return jnp.broadcast_to(s, t.shape), t


def add_slopes(
    sums: tuple[Float[Array, "B T G"], Float[Array, "B T G"]],
    pivot: Float[Array, "B T G"],
    slopes: Float[Array, "B J G 2"],
    their_pivot: Float[Array, "B J G"],
    is_linked: Bool[Array, "B T J"],
) -> tuple[Float[Array, "B T G"], Float[Array, "B T G"]]:
    """S and T with those of linked splits, which are around the splits' own pivots."""
    linked = is_linked[..., None]
    split_s, split_t = slopes[:, None, ..., 0], slopes[:, None, ..., 1]
    split_t = split_t - 2 * (their_pivot[:, None] - pivot[:, :, None]) * split_s
    return (
        sums[0] + jnp.where(linked, split_s, 0).sum(axis=2),
        sums[1] + jnp.where(linked, split_t, 0).sum(axis=2),
    )


def times(count: Float[Array, "..."], sums: Float[Array, "..."]) -> Float[Array, "..."]:
    """The product; a count of 0 makes nothing of any sum."""
    return jnp.where(count > 0, count * sums, 0)


def _launch(options: Options, kernel, inputs, out_type, *, name, splits, read, written, sums):
    geometry = options.geometry
    memory = documents_memory(inputs.documents)
    memory = [*read, *memory]
    if inputs.kept is not None:
        channels = 2 if inputs.documents is None else 3
        kept = plgpu.SMEM((tiles.BUFFERS, geometry.together, channels, TOKENS), jnp.float32)
        memory.insert(len(read), kept)
    copies = len(read) + (inputs.kept is not None) * geometry.together
    copies += inputs.documents is not None
    return tiles.launch(
        kernel,
        inputs,
        out_type,
        name=name,
        grid=(geometry.groups // geometry.together, splits, geometry.rows),
        scratch=make_memory(geometry, memory, written, copies, sums),
        interpret=options.interpret,
    )


def run_moments(options: Options, inputs: Inputs, splits: int) -> Float[Array, "B J G 4"]:
    """Count, pivot, offset of the mean and squares that the first splits hand on."""
    geometry = options.geometry
    return _launch(
        options,
        partial(moments_kernel, geometry=geometry),
        inputs._replace(scale=None, bias=None),
        jax.ShapeDtypeStruct((geometry.rows, splits, geometry.groups, 4), jnp.float32),
        name="tsn_moments",
        splits=splits,
        read=[staged(geometry, inputs.x.dtype)],
        written=[],
        sums=0,
    )


def _run_outputs(options: Options, inputs: Inputs, *, with_kept: bool) -> Outputs:
    geometry, x = options.geometry, inputs.x
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    rows, groups, packed = geometry.rows, geometry.groups, inputs.documents is not None
    out_type = Outputs(
        y=jax.ShapeDtypeStruct(x.shape, x.dtype),
        last=shape((rows, groups, 2, TOKENS)),
        kept=shape((rows, groups, geometry.tiles, 3 if packed else 2, TOKENS)),
        pivots=None if packed else shape((rows, geometry.splits, groups)),
    )
    if not with_kept:
        out_type = out_type._replace(kept=None, pivots=None)
    return _launch(
        options,
        partial(outputs_kernel, geometry=geometry, eps=options.eps),
        inputs,
        out_type,
        name="tsn_outputs",
        splits=geometry.splits,
        read=[staged(geometry, x.dtype)],
        written=[staged(geometry, x.dtype)],
        sums=geometry.together,
    )


def run_slopes(options: Options, inputs: Inputs, *, first_split: int) -> Float[Array, "B J G 2"]:
    """S and T that splits hand on, without those before `first_split`."""
    geometry = options.geometry
    splits = geometry.splits - first_split
    return _launch(
        options,
        partial(slopes_kernel, geometry=geometry, first_split=first_split),
        inputs,
        jax.ShapeDtypeStruct((geometry.rows, splits, geometry.groups, 2), jnp.float32),
        name="tsn_slopes",
        splits=splits,
        read=[staged(geometry, inputs.x.dtype), staged(geometry, inputs.dy.dtype)],
        written=[],
        sums=0,
    )


def _run_gradients(options: Options, inputs: Inputs) -> Gradients:
    geometry, x = options.geometry, inputs.x
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    per_split = geometry.rows, geometry.splits
    initial = 2 if inputs.documents is None else 4
    return _launch(
        options,
        partial(gradients_kernel, geometry=geometry),
        inputs,
        Gradients(
            dx=jax.ShapeDtypeStruct(x.shape, x.dtype),
            affine=shape((*per_split, 2, x.shape[2])),
            initial=shape((*per_split, geometry.groups, initial)),
        ),
        name="tsn_gradients",
        splits=geometry.splits,
        read=[staged(geometry, x.dtype), staged(geometry, inputs.dy.dtype)],
        written=[staged(geometry, x.dtype)],
        sums=2 * geometry.together,
    )
