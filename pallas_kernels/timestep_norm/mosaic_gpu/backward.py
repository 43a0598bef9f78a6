"""TimestepNorm on Hopper, backward: two of the four kernels that `mosaic_gpu_kernels` describes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.timestep_norm.mosaic_gpu import pipeline as tiles
from pallas_kernels.timestep_norm.mosaic_gpu.forward import (
    HALVES,
    HEAD,
    LATER,
    STARTS,
    VALID,
    Inputs,
    Memory,
    Tokens,
    find_sources,
    find_tokens,
    has,
    no_targets,
    spread,
)
from pallas_kernels.timestep_norm.mosaic_gpu.pipeline import (
    HALF,
    LANES,
    ROWS,
    TOKENS,
    Array,
    Geometry,
    Place,
)


class _Half(NamedTuple):
    """64 tokens.

    Attributes:
      relative: x - k.
      centered: x minus the mean.
      dy: cotangent of y, 0 at padding.
      rstd: r.
      valid: whether it is not padding; None if nothing is.
    """

    relative: Array
    centered: Array
    dy: Array
    rstd: Array
    valid: Array | None


def _load_half(
    inputs: Inputs, place: Place, geometry: Geometry, read: list[Any], half: int
) -> _Half:
    x, dy, kept = read[:3]
    groups, width = range(geometry.together), geometry.width

    def at_features(j):
        return tiles.over_columns([tiles.load_rows(kept.at[i, j], half) for i in groups], width)

    v, dy = tiles.load_half(x, half), tiles.load_half(dy, half)
    if inputs.documents is None:
        scalars = (inputs.pivots[place.row, place.split, group] for group in place.groups)
        pivot = tiles.over_columns([spread(k, (HALF,), ROWS) for k in scalars], width)
    else:
        pivot = at_features(2)
    relative = v - pivot
    centered = relative - at_features(0)
    if inputs.documents is None:
        return _Half(relative, centered, dy, at_features(1), None)
    flags = tiles.over_columns([tiles.load_rows(read[3].at[0, 3], half)], geometry.block_width)
    valid = has(flags, VALID)
    zero = jnp.zeros_like(v)
    dy, centered = jnp.where(valid, dy, zero), jnp.where(valid, centered, zero)
    return _Half(relative, centered, dy, at_features(1), valid)


def _group_sums(part: _Half, scale: Array, width: int) -> list[tuple[Array, Array]]:
    """Σ g and Σ g (x - mean) over a token's features, for every group."""
    g = part.dy * tiles.over_rows(scale)
    sums = tiles.sum_groups(g, width), tiles.sum_groups(g * part.centered, width)
    return list(zip(*sums, strict=True))


def _slopes(
    sums: tuple[Array, Array], count: Array, offset: Array, rstd: Array
) -> tuple[Array, Array]:
    """s and q of every token."""
    each = rstd / count
    s = -0.5 * (rstd * rstd) * (sums[1] * each)
    return s, -(each * sums[0]) - 2.0 * (offset * s)


def slopes_kernel(
    inputs: Inputs, results: Any, memory: Memory, *, geometry: Geometry, first_split: int
):
    """Writes S and T of what every split from `first_split` on hands on."""
    place = tiles.find_place(geometry, first_split)
    scale = tiles.load_columns(inputs.scale, place.columns)
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
            part = _load_half(inputs, place, geometry, read, half)
            for i, sums in enumerate(_group_sums(part, scale, geometry.width)):
                offset, rstd = (tiles.load_rows(read[2].at[i, j], half) for j in range(2))
                added = []
                values = _slopes(sums, count, offset, rstd)
                for total, value in zip(carry[i][half], values, strict=True):
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
    tiles.meet()
    for i, group in enumerate(place.groups):
        for j in range(2):
            total = tiles.load_lanes(memory.stats.at[i, j]).sum()
            results[place.row, place.split - first_split, group, j] = total


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
      sums: S, T of every group.
      initial: of each token of a tile; see `Gradients`. None if not packed.
      affine: sums of dy (x - m) r and of dy, by feature and every 64th token.
    """

    sums: list[tuple[Any, Any]]
    initial: list[tuple[Array, ...] | None]
    affine: tuple[Array, Array]


class _GradientsBlock(NamedTuple):
    """A warpgroup of `tsn_gradients`."""

    inputs: Inputs
    memory: Memory
    geometry: Geometry
    place: Place
    scale: Array

    @property
    def packed(self) -> bool:
        return self.inputs.documents is not None

    @property
    def groups(self) -> range:
        return range(self.geometry.together)

    def run_tile(self, tile, read, written, carry: _Carry) -> _Carry:
        memory = self.memory
        affine = self.sum_features(read, carry.affine)
        tokens = find_tokens(self.inputs, self.place, tile, read)
        tiles.meet()
        sums = self.sum_tokens(tokens, read, carry.sums)
        initial = [self.store_tokens(i, tokens, sums[i], carry.initial[i]) for i in self.groups]
        tiles.meet()
        for half in range(HALVES):
            dx = self.differentiate(read, half)
            written[0][0, pl.ds(half * HALF, HALF)] = dx.astype(written[0].dtype)
        handed_on = [(memory.tokens[i, 0, 0], memory.tokens[i, 1, 0]) for i in self.groups]
        return _Carry(handed_on, initial, affine)

    def sum_features(self, read, affine):
        for half in range(HALVES):
            part = _load_half(self.inputs, self.place, self.geometry, read, half)
            sums_of_groups = _group_sums(part, self.scale, self.geometry.width)
            for i, sums in enumerate(sums_of_groups):
                for j, value in enumerate(sums):
                    self.memory.stats[i, j, pl.ds(half * HALF, HALF)] = value
            of_scale = part.dy * (part.centered * part.rstd)
            affine = affine[0] + of_scale, affine[1] + part.dy
        return affine

    def sum_tokens(self, tokens: Tokens, read, entering):
        """S and T of every token, for every group."""
        values, before = [], []
        for i in self.groups:
            offset, rstd = (tiles.load_lanes(read[2].at[i, j]) for j in range(2))
            g, gc = (tiles.load_lanes(self.memory.stats.at[i, j]) for j in range(2))
            values += _slopes((g, gc), tokens.count, offset, rstd)
            before += [spread(value) for value in entering[i]]
        if self.packed:
            zero = jnp.zeros_like(values[0])
            valid = has(tokens.flags, VALID)
            values = [jnp.where(valid, value, zero) for value in values]
            goes_on = tokens.right > (TOKENS - 1) - tiles.lane_index()
            before = [jnp.where(goes_on, value, zero) for value in before]
        added = tiles.running_sums(self.memory.sums, values, tokens.right, backward=True)
        sums = [value + more for value, more in zip(before, added, strict=True)]
        return [sums[2 * i : 2 * i + 2] for i in self.groups]

    def store_tokens(self, i: int, tokens: Tokens, sums, initial):
        """Returns `initial` with the tokens that start documents added."""
        each = 1 / self.geometry.features
        for j, value in enumerate((*sums, sums[0] * (2 * each), sums[1] * each)):
            self.memory.tokens[i, j, pl.ds(0, TOKENS)] = value
        if not self.packed:
            return None
        starts, later = has(tokens.flags, STARTS), has(tokens.flags, LATER)
        zero = jnp.zeros_like(sums[0])
        at_start = [jnp.where(starts, value, zero) for value in sums]
        first = [jnp.where(later, zero, value) for value in at_start]
        others = [jnp.where(later, value, zero) for value in at_start]
        return tuple(a + b for a, b in zip(initial, first + others, strict=True))

    def differentiate(self, read, half: int) -> Array:
        part = _load_half(self.inputs, self.place, self.geometry, read, half)
        slope, constant = (
            tiles.over_columns(
                [tiles.load_rows(self.memory.tokens.at[i, j], half) for i in self.groups],
                self.geometry.width,
            )
            for j in (2, 3)
        )
        dx = part.dy * tiles.over_rows(self.scale) * part.rstd
        dx = dx + (constant + part.relative * slope)
        return dx if part.valid is None else jnp.where(part.valid, dx, jnp.zeros_like(dx))


def gradients_kernel(inputs: Inputs, results: Gradients, memory: Memory, *, geometry: Geometry):
    """Writes dx and sums for the gradients of all else."""
    place = tiles.find_place(geometry)
    tiles.clear(memory.sums)
    scale = tiles.load_columns(inputs.scale, place.columns)
    block = _GradientsBlock(inputs, memory, geometry, place, scale)
    zeros = tiles.fill((HALF, geometry.block_width), plgpu.Layout.WGMMA)
    none = tiles.fill((TOKENS,), LANES)
    entering = [
        tuple(inputs.entering[place.row, place.split, group, j] for j in range(2))
        for group in place.groups
    ]
    initial = [(none,) * 4 if block.packed else None for _ in place.groups]
    carry = tiles.stream(
        place,
        memory.stage,
        find_sources(inputs, place, inputs.x, inputs.dy),
        lambda tile: [[place.window(results.dx, tile)]],
        _Carry(entering, initial, (zeros, zeros)),
        block.run_tile,
        backward=True,
    )
    for j, value in enumerate(carry.affine):
        results.affine[place.row, place.split, j, place.columns] = value.sum(axis=0)
    for i, group in enumerate(place.groups):
        sums = carry.initial[i]
        values = carry.sums[i] if sums is None else [value.sum() for value in sums]
        for j, value in enumerate(values):
            results.initial[place.row, place.split, group, j] = value
