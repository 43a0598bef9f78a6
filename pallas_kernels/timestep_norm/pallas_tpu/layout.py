"""How TimestepNorm's TPU kernels see their arrays: tokens along lanes, channels along sublanes.

A tile of x is turned on its side, so that a sum over a group's channels is a sum of registers, and
a running sum over tokens runs along the lanes of a few registers that hold all groups.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import LANES, VMEM_LIMIT, TpuBlocks
from pallas_kernels.timestep_norm.types import document_starts

Operand = tuple[Array | jax.ShapeDtypeStruct, pl.BlockSpec]

# Rows of `find_places`; a register has 8.
COUNT, INITIAL_COUNT, FIRST, LAST, FLAGS = range(5)
_PLACES_ROWS = 8
# Steps of 128 tokens that are scheduled together.
_OVERLAPPING = 4
# Bits of the row FLAGS.
VALID, START, LATER, FINAL = 1, 2, 4, 8


class Part(NamedTuple):
    """At most 128 channels of one group.

    Attributes:
      group: its number in the grid step.
      channels: among those of the grid step.
      first_feature: of the group.
    """

    group: int
    channels: slice
    first_feature: int

    @property
    def row(self) -> slice:
        """Of the group in statistics."""
        return slice(self.group, self.group + 1)


class Band(NamedTuple):
    """128 channels of a grid step, and whose they are."""

    channels: slice
    parts: list[Part]


class GroupSums(dict[int, Array]):
    """Sums over the channels of groups, (1, T) each."""

    def add(self, group: int, values: Float[Array, "C T"]) -> None:
        """Adds more channels of a group."""
        added = values.sum(axis=0, keepdims=True)
        self[group] = self[group] + added if group in self else added


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call.

    Attributes:
      length: tokens of a row.
      features: of a group, without padding.
      blocks: of a grid step.
      packed: whether there are documents and padding.
      eps: added to the variance.
      interpret: for `pallas_call`.
    """

    length: int
    features: int
    blocks: TpuBlocks
    packed: bool
    eps: float
    interpret: bool | pltpu.InterpretParams

    @property
    def tiles(self) -> int:
        """Grid steps along a row."""
        return -(-self.length // self.blocks.tokens)

    @property
    def padded_length(self) -> int:
        """Tokens of a row in the statistics of groups."""
        return self.tiles * self.blocks.tokens

    @property
    def steps(self) -> int:
        """Grid steps along the channels."""
        return self.blocks.padded_groups // self.blocks.groups

    @property
    def rows(self) -> int:
        """Rows that hold the statistics of a grid step's groups."""
        return -(-self.blocks.groups // 8) * 8

    @property
    def has_gaps(self) -> bool:
        """Whether a tile may hold what is no token."""
        return self.packed or self.length != self.padded_length

    @property
    def bands(self) -> list[Band]:
        """A grid step's channels, 128 at once."""
        features = self.blocks.features
        size = min(features, LANES)
        return [
            Band(
                slice(start, start + LANES),
                [
                    Part(at // features, slice(at, at + size), at % features)
                    for at in range(start, start + LANES, size)
                ],
            )
            for start in range(0, self.blocks.channels, LANES)
        ]

    @property
    def closed_bands(self) -> list[list[Band]]:
        """Bands in lists that hold whole groups."""
        size = max(1, self.blocks.features // LANES)
        return [self.bands[at : at + size] for at in range(0, len(self.bands), size)]

    def for_lanes(self, body: Callable[[Any], None]) -> None:
        """Runs `body` on every 128 tokens of a tile."""

        def step(i: Any, _: None) -> None:
            body(pl.ds(pl.multiple_of(i * LANES, LANES), LANES))

        count = self.blocks.tokens // LANES
        # A transpose hands out its first rows when it has taken in the last, so several overlap.
        unroll = 1 if self.interpret else math.gcd(count, _OVERLAPPING)
        lax.fori_loop(0, count, step, None, unroll=unroll)

    def add_lanes(self, values: Float[Array, "R T"]) -> Float[Array, "R 128"]:
        """Sums over 128 tokens of a tile each."""
        starts = range(0, self.blocks.tokens, LANES)
        return functools.reduce(jnp.add, [values[:, at : at + LANES] for at in starts])

    def where_valid(self, places: Any, lanes: Any, values: Array) -> Array:
        """Zero at padding."""
        if not self.has_gaps:
            return values
        flags = jnp.broadcast_to(places[FLAGS : FLAGS + 1, lanes], values.shape)
        return jnp.where((flags & VALID) != 0, values, 0)

    def without_padding(self, values: Array, part: Part) -> Array:
        """Zero in place of the channels that fill up a group."""
        if self.features == self.blocks.features:
            return values
        feature = part.first_feature + lax.broadcasted_iota(jnp.int32, values.shape, 0)
        return jnp.where(feature < self.features, values, 0)


def find_places(
    plan: Plan,
    rows: int,
    state_count: Int32[Array, " B"],
    prior_count: Int32[Array, ""],
    segment_ids: Int32[Array, "B L"] | None,
) -> Int32[Array, "B 8 L"]:
    """Where every token stands.

    COUNT: tokens in the state after it. INITIAL_COUNT: tokens in the state before its document's
    first. FIRST: index of that one. LAST: index before the next document's first token. FLAGS:
    VALID unless it is padding, START at a document's first token, LATER in all documents but a
    row's first, FINAL at a row's last token.
    """
    length = plan.padded_length
    index = jnp.arange(length, dtype=jnp.int32)
    if segment_ids is None:
        flags = VALID * (index < plan.length) + START * (index == 0)
        flags += FINAL * (index == plan.length - 1)
        places = {
            COUNT: state_count[:, None] + jnp.minimum(index + 1, plan.length),
            INITIAL_COUNT: state_count[:, None],
            FIRST: 0,
            LAST: length - 1,
            FLAGS: flags,
        }
    else:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, length - plan.length)))
        valid, starts = segment_ids != 0, document_starts(segment_ids)
        tokens = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
        later = jnp.cumsum(starts, axis=1) > 1
        before = lax.cummax(jnp.where(starts, tokens - 1, 0), axis=1)
        initial = jnp.where(later, prior_count, state_count[:, None])
        ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        final = valid & (tokens == tokens[:, -1:])
        places = {
            COUNT: initial + tokens - before,
            INITIAL_COUNT: initial,
            FIRST: lax.cummax(jnp.where(starts, index, 0), axis=1),
            LAST: lax.cummin(jnp.where(ends, index, length - 1), axis=1, reverse=True),
            FLAGS: VALID * valid + START * starts + LATER * later + FINAL * final,
        }
    shape = (rows, length)
    parts = [jnp.broadcast_to(jnp.int32(places[row]), shape) for row in range(len(places))]
    return jnp.pad(
        jnp.stack(parts, axis=1), ((0, 0), (0, _PLACES_ROWS - len(places)), (0, 0))
    )  # fmt: skip


class Tile(NamedTuple):
    """Places of a tile's tokens, repeated for every group: (rows, tokens)."""

    count: Float[Array, "R T"]
    initial_count: Float[Array, "R T"]
    flags: Int32[Array, "R T"]
    lane: Int32[Array, "R T"]
    from_start: Int32[Array, "R T"]
    to_end: Int32[Array, "R T"]
    came_before: Array
    goes_on: Array

    @classmethod
    def read(cls, plan: Plan, places: Any, number: Array) -> "Tile":
        """The places of tile `number` of a row."""
        tokens = plan.blocks.tokens
        shape = (plan.rows, tokens)
        row = [jnp.broadcast_to(places[i : i + 1, :], shape) for i in range(FLAGS + 1)]
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        first, last = row[FIRST] - number * tokens, row[LAST] - number * tokens
        return cls(
            count=jnp.maximum(row[COUNT], 1).astype(jnp.float32),
            initial_count=row[INITIAL_COUNT].astype(jnp.float32),
            flags=row[FLAGS],
            lane=lane,
            from_start=lane - jnp.maximum(first, 0),
            to_end=jnp.minimum(last, tokens - 1) - lane,
            came_before=first < 0,
            goes_on=last >= tokens,
        )

    def has(self, flag: int) -> Array:
        """Where a flag is set."""
        return (self.flags & flag) != 0

    def running_sums(self, values: Array, *, reverse: bool = False) -> Array:
        """Inclusive sums along each document inside the tile; selects, so infinities stay where
        they are.
        """
        tokens = values.shape[1]
        left = self.to_end if reverse else self.from_start
        distance = 1
        while distance < tokens:
            shifted = pltpu.roll(values, tokens - distance if reverse else distance, 1)
            values = values + jnp.where(left >= distance, shifted, 0)
            distance *= 2
        return values


def repeat_lanes(column: Array, tokens: int) -> Array:
    """(R, 128) whose lanes are equal, for more tokens."""
    return jnp.tile(column, (1, tokens // LANES))


def fill_lanes(values: Array, lane: int) -> Array:
    """One lane of (R, T) in all of (R, 128)."""
    return jnp.broadcast_to(values[:, lane : lane + 1], (values.shape[0], LANES))


def turn_row(row: Float[Array, "1 C"]) -> Float[Array, "C 128"]:
    """A number for every channel, in all lanes of the channel's row."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


class Frame:
    """Collects a kernel's operands by name and calls it on a grid of rows, channels and tiles."""

    def __init__(self, plan: Plan, batch: int, *, backward: bool):
        """Starts without operands; `backward` visits tiles from a row's end to its start."""
        self.plan = plan
        self.batch = batch
        self.backward = backward

    def _tile(self, t: Any) -> Any:
        return self.plan.tiles - 1 - t if self.backward else t

    def sequence(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, L, D)."""
        block = (None, self.plan.blocks.tokens, self.plan.blocks.channels)
        return value, pl.BlockSpec(block, lambda b, d, t: (b, self._tile(t), d))

    def places(self, value: Array) -> Operand:
        """(B, 8, L) of `find_places`."""
        block = (None, value.shape[1], self.plan.blocks.tokens)
        return value, pl.BlockSpec(block, lambda b, d, t: (b, 0, self._tile(t)))

    def statistics(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, S, R, L), a number for every token and group."""
        block = (None, None, self.plan.rows, self.plan.blocks.tokens)
        return value, pl.BlockSpec(block, lambda b, d, t: (b, d, 0, self._tile(t)))

    def pivots(self, shape: tuple[int, ...]) -> Operand:
        """(B, S, R, L), or (B, S, R, 128) if every row has one pivot."""
        if self.plan.packed:
            return self.statistics(jax.ShapeDtypeStruct(shape, jnp.float32))
        spec = pl.BlockSpec((None, None, self.plan.rows, LANES), lambda b, d, t: (b, d, 0, 0))
        return jax.ShapeDtypeStruct((*shape[:3], LANES), jnp.float32), spec

    def moments(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, S, N, R, 128), numbers for every row and group."""
        block = (None, None, *value.shape[2:])
        return value, pl.BlockSpec(block, lambda b, d, t: (b, d, 0, 0, 0))

    def channels(self, value: Array) -> Operand:
        """(1, D)."""
        return value, pl.BlockSpec((1, self.plan.blocks.channels), lambda b, d, t: (0, d))

    def row_channels(self, value: jax.ShapeDtypeStruct) -> Operand:
        """(B, 1, D)."""
        block = (None, 1, self.plan.blocks.channels)
        return value, pl.BlockSpec(block, lambda b, d, t: (b, 0, d))

    def call(
        self,
        kernel: Callable[[Any], None],
        refs: Callable[..., Any],
        *,
        inputs: Mapping[str, Operand],
        outputs: Mapping[str, Operand],
        scratch: Mapping[str, Any],
        name: str,
    ) -> dict[str, Any]:
        """Runs `kernel(refs(**references by name))`."""
        plan = self.plan
        names = [*inputs, *outputs, *scratch]
        arrays = [value for value, _ in inputs.values()]
        shapes = [value for value, _ in outputs.values()]
        results = pl.pallas_call(
            lambda *references: kernel(refs(**dict(zip(names, references, strict=True)))),
            grid=(self.batch, plan.steps, plan.tiles),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VMEM_LIMIT,
            ),
            cost_estimate=pl.CostEstimate(
                flops=10 * sum(a.size for a in arrays),
                bytes_accessed=sum(a.size * a.dtype.itemsize for a in [*arrays, *shapes]),
                transcendentals=0,
            ),
            interpret=plan.interpret,
            name=name,
        )(*arrays)
        return dict(zip(outputs, results, strict=True))
