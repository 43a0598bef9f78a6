"""The two kernels of TimestepNorm's backward pass on Hopper; `mosaic_gpu_kernels` says what they do."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.timestep_norm import mosaic_gpu_tiles as tiles
from pallas_kernels.timestep_norm.mosaic_gpu_kernels import (
    HALVES,
    HEAD,
    LATER,
    STARTS,
    VALID,
    Inputs,
    Memory,
    find_sources,
    find_tokens,
    has,
    no_targets,
    spread,
)
from pallas_kernels.timestep_norm.mosaic_gpu_tiles import (
    HALF,
    LANES,
    ROWS,
    TOKENS,
    Array,
    Geometry,
    Place,
)


class _Half(NamedTuple):
    """64 tokens of a group.

    Attributes:
      relative: x - k.
      centered: x minus the mean.
      dy: cotangent of y, 0 at padding.
      rstd: r of every token.
      valid: whether it is not padding, at every feature; None if all are.
    """

    relative: Array
    centered: Array
    dy: Array
    rstd: Array
    valid: Array | None


def _load_half(inputs: Inputs, place: Place, i: int, read: list[Any], half: int) -> _Half:
    x, dy, kept = (part.at[i] for part in read[:3])
    width = place.width
    v, dy = tiles.load_half(x, half), tiles.load_half(dy, half)
    offset, rstd = (tiles.load_rows(kept.at[j], half) for j in range(2))
    if inputs.documents is None:
        relative = v - inputs.pivots[place.row, place.split, place.groups[i]]
    else:
        relative = v - tiles.over_columns(tiles.load_rows(kept.at[2], half), width)
    centered = relative - tiles.over_columns(offset, width)
    if inputs.documents is None:
        return _Half(relative, centered, dy, rstd, None)
    flags = tiles.over_columns(tiles.load_rows(read[3].at[0, 3], half), width)
    valid = has(flags, VALID)
    zero = jnp.zeros_like(v)
    dy, centered = jnp.where(valid, dy, zero), jnp.where(valid, centered, zero)
    return _Half(relative, centered, dy, rstd, valid)


def _group_sums(part: _Half, scale: Array) -> tuple[Array, Array]:
    """Σ g and Σ g (x - mean) over a token's features."""
    g = part.dy * tiles.over_rows(scale)
    return g.sum(axis=1), (g * part.centered).sum(axis=1)


def _slopes(
    sums: tuple[Array, Array], count: Array, offset: Array, rstd: Array
) -> tuple[Array, Array]:
    """s and q of every token."""
    s = -0.5 * (rstd * rstd * rstd) * sums[1] / count
    return s, -(rstd * sums[0]) / count - 2.0 * (offset * s)


def slopes_kernel(inputs: Inputs, results: Any, memory: Memory, *, geometry: Geometry):
    """Writes S and T of what every split but the first hands on."""
    place = tiles.find_place(geometry, first_split=1)
    scales = [tiles.load_columns(inputs.scale, place.columns(i)) for i in range(geometry.together)]
    zero = tiles.fill((HALF,), ROWS)

    def run_tile(tile, read, written, carry):
        new = [[] for _ in carry]
        for half in range(HALVES):
            keep = None
            if inputs.documents is None:
                index = plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=ROWS)
                first = inputs.count[place.row] + tile * TOKENS + half * HALF + 1
                count = (index + first).astype(jnp.float32)
            else:
                count, flags = (tiles.load_rows(read[3].at[0, j], half) for j in (0, 3))
                count = jnp.maximum(count.astype(jnp.float32), 1.0)
                keep = has(flags, VALID) & has(flags, HEAD)
            for i in range(geometry.together):
                part = _load_half(inputs, place, i, read, half)
                offset = tiles.load_rows(read[2].at[i, 0], half)
                found = _slopes(_group_sums(part, scales[i]), count, offset, part.rstd)
                added = []
                for total, value in zip(carry[i][half], found, strict=True):
                    if keep is not None:
                        value = jnp.where(keep, value, jnp.zeros_like(value))
                    added.append(total + value)
                new[i].append(tuple(added))
        return new

    # Forward, so that the next kernel finds where it begins in the L2 cache.
    carry = tiles.stream(
        place,
        memory.stage,
        find_sources(inputs, place, inputs.x, inputs.dy),
        no_targets,
        [[(zero, zero)] * HALVES] * geometry.together,
        run_tile,
        backward=False,
    )
    for i in range(geometry.together):
        for half in range(HALVES):
            for j, value in enumerate(carry[i][half]):
                memory.stats[i, j, pl.ds(half * HALF, HALF)] = value
    plgpu.commit_smem()
    for i, group in enumerate(place.groups):
        for j in range(2):
            total = tiles.load_lanes(memory.stats.at[i, j]).sum()
            results[place.row, place.split - 1, group, j] = total


class Gradients(NamedTuple):
    """Results of `tsn_gradients`, or their shapes.

    Attributes:
      dx: gradient of x.
      affine: gradients of scale and bias from every split.
      initial: S and T at every split's first token; if packed, summed over the tokens that start
        a row's first document, then over those that start later ones.
    """

    dx: Any
    affine: Any  # (B S 2 D)
    initial: Any  # (B S G 2 or 4)


class _Carry(NamedTuple):
    """What a tile hands on, backward: S and T of the tokens after it, as scalars, and sums.

    Attributes:
      sums: S, T.
      affine: sums of dy (x - m) r and of dy, by feature and every 64th token.
      initial: of each token of a tile; see `Gradients`. None if not packed.
    """

    sums: tuple[Any, Any]
    affine: tuple[Array, Array]
    initial: tuple[Array, ...] | None


def gradients_kernel(inputs: Inputs, results: Gradients, memory: Memory, *, geometry: Geometry):
    """Writes dx and sums for the gradients of all else."""
    place = tiles.find_place(geometry)
    width, groups = geometry.width, range(geometry.together)
    each = 1 / geometry.features
    packed = inputs.documents is not None
    tiles.clear(memory.sums)
    scales = [tiles.load_columns(inputs.scale, place.columns(i)) for i in groups]

    def sum_features(read, carries):
        affine = [carry.affine for carry in carries]
        for half in range(HALVES):
            rows = pl.ds(half * HALF, HALF)
            for i in groups:
                part = _load_half(inputs, place, i, read, half)
                for j, value in enumerate(_group_sums(part, scales[i])):
                    memory.stats[i, j, rows] = value
                of_scale = part.dy * (part.centered * tiles.over_columns(part.rstd, width))
                affine[i] = affine[i][0] + of_scale, affine[i][1] + part.dy
        return affine

    def sum_tokens(i, tokens, read, carry):
        offset, rstd = (tiles.load_lanes(read[2].at[i, j]) for j in range(2))
        found = tuple(tiles.load_lanes(memory.stats.at[i, j]) for j in range(2))
        s, q = _slopes(found, tokens.count, offset, rstd)
        before = [spread(value) for value in carry.sums]
        if packed:
            zero = jnp.zeros_like(s)
            valid = has(tokens.flags, VALID)
            s, q = jnp.where(valid, s, zero), jnp.where(valid, q, zero)
            goes_on = tokens.right > (TOKENS - 1) - tiles.lane_index()
            before = [jnp.where(goes_on, value, zero) for value in before]
        added = tiles.running_sums(memory.sums, [s, q], tokens.right, backward=True)
        return [value + more for value, more in zip(before, added, strict=True)]

    def store_tokens(i, tokens, sums, initial):
        memory.tokens[i, 0, pl.ds(0, TOKENS)] = sums[0]
        memory.tokens[i, 1, pl.ds(0, TOKENS)] = sums[1]
        memory.tokens[i, 2, pl.ds(0, TOKENS)] = sums[0] * (2 * each)
        memory.tokens[i, 3, pl.ds(0, TOKENS)] = sums[1] * each
        if not packed:
            return None
        starts, later = has(tokens.flags, STARTS), has(tokens.flags, LATER)
        zero = jnp.zeros_like(sums[0])
        at_start = [jnp.where(starts, value, zero) for value in sums]
        first = [jnp.where(later, zero, value) for value in at_start]
        others = [jnp.where(later, value, zero) for value in at_start]
        return tuple(a + b for a, b in zip(initial, first + others, strict=True))

    def run_tile(tile, read, written, carries):
        affine = sum_features(read, carries)
        tokens = find_tokens(inputs, place, tile, read)
        plgpu.commit_smem()
        sums = [sum_tokens(i, tokens, read, carries[i]) for i in groups]
        initial = [store_tokens(i, tokens, sums[i], carries[i].initial) for i in groups]
        plgpu.commit_smem()
        for half in range(HALVES):
            rows = pl.ds(half * HALF, HALF)
            for i in groups:
                part = _load_half(inputs, place, i, read, half)
                slope, constant = (
                    tiles.over_columns(tiles.load_rows(memory.tokens.at[i, j], half), width)
                    for j in (2, 3)
                )
                g = part.dy * tiles.over_rows(scales[i])
                dx = g * tiles.over_columns(part.rstd, width)
                dx = dx + (constant + part.relative * slope)
                if part.valid is not None:
                    dx = jnp.where(part.valid, dx, jnp.zeros_like(dx))
                written[0].at[i][rows] = dx.astype(written[0].dtype)
        return [
            _Carry((memory.tokens[i, 0, 0], memory.tokens[i, 1, 0]), affine[i], initial[i])
            for i in groups
        ]

    zeros = tiles.fill((HALF, width), plgpu.Layout.WGMMA)
    none = tiles.fill((TOKENS,), LANES)
    start = [
        _Carry(
            tuple(inputs.entering[place.row, place.split, group, j] for j in range(2)),
            (zeros, zeros),
            (none,) * 4 if packed else None,
        )
        for group in place.groups
    ]
    carries = tiles.stream(
        place,
        memory.stage,
        find_sources(inputs, place, inputs.x, inputs.dy),
        lambda tile: [[place.window(results.dx, i, tile) for i in groups]],
        start,
        run_tile,
        backward=True,
    )
    for i, (group, carry) in enumerate(zip(place.groups, carries, strict=True)):
        for j, value in enumerate(carry.affine):
            results.affine[place.row, place.split, j, place.columns(i)] = value.sum(axis=0)
        initial = carry.sums if carry.initial is None else [v.sum() for v in carry.initial]
        for j, value in enumerate(initial):
            results.initial[place.row, place.split, group, j] = value
