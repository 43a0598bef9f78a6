"""Launches over tiles of tokens and groups: block specs of every operand, scratch memory."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.common.devices import DEFAULT_VMEM
from pallas_kernels.common.pallas_tpu import Operand, launch
from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import LANES
from pallas_kernels.timestep_norm.pallas_tpu.layout import TimestepNormTpuPlan


@dataclasses.dataclass(frozen=True)
class TileSpecs:
    """Arrays of a call with the block of each that a grid step works on.

    Attributes:
      plan: static sizes.
      reverse: whether tiles are visited from a row's end to its start.
    """

    plan: TimestepNormTpuPlan
    reverse: bool

    def tile_index(self, step: Any) -> Any:
        """The tile that a step of the last grid axis works on."""
        return self.plan.tiles - 1 - step if self.reverse else step

    def sequence(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, L, D)."""
        block = (None, self.plan.blocks.tokens, self.plan.blocks.channels)
        return value, pl.BlockSpec(block, lambda b, d, t: (b, self.tile_index(t), d))

    def positions(self, value: Array) -> Operand:
        """(B, 8, L) of `position_rows`."""
        block = (None, value.shape[1], self.plan.blocks.tokens)
        return value, pl.BlockSpec(block, lambda b, d, t: (b, 0, self.tile_index(t)))

    def statistics(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, S, R, L), a number for every token and group."""
        block = (None, None, self.plan.group_rows, self.plan.blocks.tokens)
        return value, pl.BlockSpec(block, lambda b, d, t: (b, d, 0, self.tile_index(t)))

    def pivots(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, S, R, L) of packed rows, else (B, S, R, 128): one pivot a row, in all lanes."""
        if self.plan.is_packed:
            return self.statistics(value)
        spec = pl.BlockSpec((None, None, self.plan.group_rows, LANES), lambda b, d, t: (b, d, 0, 0))
        return value, spec

    def group_moments(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, S, N, R, 128), N numbers for every row and group."""
        block = (None, None, *value.shape[2:])
        return value, pl.BlockSpec(block, lambda b, d, t: (b, d, 0, 0, 0))

    def channels(self, value: Array) -> Operand:
        """(1, D)."""
        return value, pl.BlockSpec((1, self.plan.blocks.channels), lambda b, d, t: (0, d))

    def row_channels(self, value: jax.ShapeDtypeStruct) -> Operand:
        """(B, 1, D)."""
        block = (None, 1, self.plan.blocks.channels)
        return value, pl.BlockSpec(block, lambda b, d, t: (b, 0, d))


def launch_over_tiles(
    kernel: Callable[..., None],
    plan: TimestepNormTpuPlan,
    num_rows: int,
    *,
    inputs: Mapping[str, Operand],
    outputs: Mapping[str, Operand],
    scratch: Mapping[str, Any],
    name: str,
) -> dict[str, Array]:
    """Runs `kernel(**references by name)` for every row, channel step and tile of tokens."""
    return launch(
        kernel,
        name=name,
        grid=(num_rows, plan.channel_steps, plan.tiles),
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
        vmem_limit=DEFAULT_VMEM,
        flops=10 * sum(value.size for value, _ in inputs.values()),
        interpret=plan.interpret,
    )


def initialize_scratch(
    tile_step: Array, *, per_channel: Sequence[tuple[Any, Any]], zeros: Sequence[Any]
) -> None:
    """Prepares VMEM in the first step of every row and channel step.

    Args:
      tile_step: step of the last grid axis.
      per_channel: pairs of a (C, 128) scratch reference and the (1, C) row that its lanes repeat.
      zeros: references that start from zero.
    """

    @pl.when(tile_step == 0)
    def _initialize() -> None:
        for ref, row in per_channel:
            row = row[...]
            ref[...] = jnp.broadcast_to(row, (LANES, row.shape[1])).T
        for ref in zeros:
            ref[...] = jnp.zeros_like(ref)
