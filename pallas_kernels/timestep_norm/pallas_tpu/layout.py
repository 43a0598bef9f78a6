"""Tiles of TimestepNorm's TPU kernels: tokens along lanes, channels along sublanes.

A tile of x is transposed in VMEM, so that a sum over a group's channels is a sum of registers, and
a running sum over tokens runs along the lanes of a few registers that hold all groups.

Both kernels have the grid (row, channel step, tile of tokens); the last axis runs in order, in the
backward kernel from a row's end. B rows, L tokens, D channels, S channel steps, R rows of group
statistics.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import (
    LANES,
    SUBLANES,
    TimestepNormTpuBlocks,
)

# Steps of 128 tokens that are scheduled together.
_OVERLAPPING_STEPS = 4


class GroupSlice(NamedTuple):
    """At most 128 channels of one group.

    Attributes:
      group: index of the group in the tile.
      channels: the channels in the tile.
      first_feature: index of the first channel in its group.
    """

    group: int
    channels: slice
    first_feature: int

    @property
    def row(self) -> slice:
        """The group's row of statistics."""
        return slice(self.group, self.group + 1)


class ChannelBlock(NamedTuple):
    """128 channels of a tile and the groups that they belong to."""

    channels: slice
    group_slices: list[GroupSlice]


class GroupSums(dict[int, Array]):
    """Sums over the channels of groups, (1, T) each."""

    def add(self, group: int, values: Float[Array, "C T"]) -> None:
        """Adds more channels of a group."""
        added = values.sum(axis=0, keepdims=True)
        self[group] = self[group] + added if group in self else added


@dataclasses.dataclass(frozen=True)
class TimestepNormTpuPlan:
    """Static sizes of one call.

    Attributes:
      length: tokens of a row.
      features: features of a group without padding.
      blocks: sizes of a tile.
      is_packed: whether rows have documents and padding.
      eps: added to the variance.
      interpret: as in `pl.pallas_call`.
    """

    length: int
    features: int
    blocks: TimestepNormTpuBlocks
    is_packed: bool
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
    def channel_steps(self) -> int:
        """Grid steps along the channels."""
        return self.blocks.padded_groups // self.blocks.groups

    @property
    def group_rows(self) -> int:
        """Rows that hold the statistics of a tile's groups."""
        return -(-self.blocks.groups // SUBLANES) * SUBLANES

    @property
    def may_have_padding(self) -> bool:
        """Whether a tile may hold positions without a token."""
        return self.is_packed or self.length != self.padded_length

    @property
    def channel_blocks(self) -> list[ChannelBlock]:
        """A tile's channels, 128 at once."""
        features = self.blocks.features
        size = min(features, LANES)
        return [
            ChannelBlock(
                slice(start, start + LANES),
                [
                    GroupSlice(at // features, slice(at, at + size), at % features)
                    for at in range(start, start + LANES, size)
                ],
            )
            for start in range(0, self.blocks.channels, LANES)
        ]

    @property
    def whole_group_blocks(self) -> list[list[ChannelBlock]]:
        """Channel blocks in lists that hold whole groups."""
        blocks, size = self.channel_blocks, max(1, self.blocks.features // LANES)
        return [blocks[at : at + size] for at in range(0, len(blocks), size)]

    @property
    def transposed_tile(self) -> Any:
        """VMEM for a tile with tokens along lanes."""
        return pltpu.VMEM((self.blocks.channels, self.blocks.tokens), jnp.float32)

    @property
    def per_channel(self) -> Any:
        """VMEM for 128 numbers of every channel of a tile."""
        return pltpu.VMEM((self.blocks.channels, LANES), jnp.float32)

    @property
    def per_group(self) -> Any:
        """VMEM for a number of every token and group of a tile."""
        return pltpu.VMEM((self.group_rows, self.blocks.tokens), jnp.float32)

    def for_lanes(self, body: Callable[[Any], None]) -> None:
        """Runs `body` on every 128 tokens of a tile."""

        def step(i: Any, _: None) -> None:
            body(pl.ds(pl.multiple_of(i * LANES, LANES), LANES))

        count = self.blocks.tokens // LANES
        # A transpose yields its first rows only after its last input, so several steps overlap.
        unroll = 1 if self.interpret else math.gcd(count, _OVERLAPPING_STEPS)
        lax.fori_loop(0, count, step, None, unroll=unroll)

    def add_lanes(self, values: Float[Array, "R T"]) -> Float[Array, "R 128"]:
        """Sums of the tokens in every 128th lane of a tile."""
        starts = range(0, self.blocks.tokens, LANES)
        return functools.reduce(jnp.add, [values[:, at : at + LANES] for at in starts])

    def zero_channel_padding(self, values: Array, group_slice: GroupSlice) -> Array:
        """Zero at the channels that pad a group."""
        if self.features == self.blocks.features:
            return values
        feature = group_slice.first_feature + lax.broadcasted_iota(jnp.int32, values.shape, 0)
        return jnp.where(feature < self.features, values, 0)


def repeat_lanes(column: Float[Array, "R 128"], tokens: int) -> Float[Array, "R T"]:
    """Numbers that are equal in all lanes, for `tokens` lanes."""
    return jnp.tile(column, (1, tokens // LANES))


def broadcast_lane(values: Float[Array, "R T"], lane: int) -> Float[Array, "R 128"]:
    """One lane's numbers in 128 lanes."""
    return jnp.broadcast_to(values[:, lane : lane + 1], (values.shape[0], LANES))
