"""Operands of the Hopper kernels in global memory, and their tiles in shared memory."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.timestep_norm.mosaic_gpu.layout import Array, lane_index, load_lanes
from pallas_kernels.timestep_norm.mosaic_gpu.pipeline import (
    NUM_STAGES,
    StageBuffers,
    WorkItem,
    tile_buffers,
)
from pallas_kernels.timestep_norm.mosaic_gpu.running_sums import running_sums_smem
from pallas_kernels.timestep_norm.row_splits.types import (
    COUNT,
    FLAGS,
    FROM_START,
    TILE,
    TO_END,
    KernelInputs,
    TimestepNormGeometry,
)


class InputTiles(NamedTuple):
    """The tile of every streamed operand: slices of global memory, or buffers in shared memory."""

    x: Any
    dy: Any = None
    statistics: Any = None
    token_info: Any = None


class KernelScratch(NamedTuple):
    """Shared memory of a block.

    Attributes:
      stage: tiles of the streamed operands.
      sums: buffers of `running_sums`; None in kernels without them.
      feature_sums: (groups, 4, 128) numbers of every token that go from `ROW_LAYOUT` to
        `LANE_LAYOUT`: sums over features.
      token_results: (groups, 4, 128) numbers that go back: results of the running sums.
    """

    stage: StageBuffers
    sums: Any
    feature_sums: Any
    token_results: Any


def kernel_scratch(
    geometry: TimestepNormGeometry, inputs: KernelInputs, *, has_output: bool, num_sums: int
) -> KernelScratch:
    """Shared memory for a kernel that streams x and the other sequences of `inputs`.

    Args:
      geometry: static sizes.
      inputs: the kernel's operands.
      has_output: whether it writes a sequence of x's shape and dtype.
      num_sums: arrays of a call of `running_sums`.
    """
    groups = geometry.groups_per_block
    is_packed, x = inputs.documents is not None, tile_buffers(geometry, inputs.x.dtype)
    dy = statistics = token_info = None
    copies = 1
    if inputs.dy is not None:
        dy = tile_buffers(geometry, inputs.dy.dtype)
        copies += 1
    if inputs.statistics is not None:
        statistics = plgpu.SMEM((NUM_STAGES, groups, 3 if is_packed else 2, TILE), jnp.float32)
        copies += groups
    if is_packed:
        token_info = plgpu.SMEM((NUM_STAGES, 1, 4, TILE), jnp.int32)
        copies += 1
    return KernelScratch(
        StageBuffers(
            InputTiles(x, dy, statistics, token_info),
            tile_buffers(geometry, inputs.x.dtype) if has_output else None,
            plgpu.Barrier(num_arrivals=copies, num_barriers=NUM_STAGES),
        ),
        running_sums_smem(num_sums) if num_sums else None,
        plgpu.SMEM((groups, 4, TILE), jnp.float32),
        plgpu.SMEM((groups, 4, TILE), jnp.float32),
    )


def input_slices(inputs: KernelInputs, work: WorkItem, tile: Any) -> InputTiles:
    """The slices of global memory that are copied for a tile, in lists; None as in `inputs`."""
    x = [work.sequence_slice(inputs.x, tile)]
    dy = statistics = token_info = None
    if inputs.dy is not None:
        dy = [work.sequence_slice(inputs.dy, tile)]
    if inputs.statistics is not None:
        statistics = [inputs.statistics.at[work.row, group, tile] for group in work.groups]
    if inputs.documents is not None:
        token_info = [inputs.documents.token_info.at[work.row, tile]]
    return InputTiles(x, dy, statistics, token_info)


class TokenInfo(NamedTuple):
    """Positions of a tile's tokens; None in rows without documents.

    Attributes:
      count: tokens in the state after this one, at least 1.
      from_start: tokens since the document's first.
      to_end: tokens to the document's last.
      flags: flags of `TimestepNormDocuments`.
    """

    count: Array
    from_start: Array | None
    to_end: Array | None
    flags: Array | None


def load_token_info(
    inputs: KernelInputs, work: WorkItem, tile: Any, tiles_smem: InputTiles
) -> TokenInfo:
    if inputs.documents is None:
        count = lane_index() + (inputs.initial_count[work.row] + tile * TILE + 1)
        return TokenInfo(count.astype(jnp.float32), None, None, None)
    count, from_start, to_end, flags = (
        load_lanes(tiles_smem.token_info.at[0, j]) for j in (COUNT, FROM_START, TO_END, FLAGS)
    )
    return TokenInfo(jnp.maximum(count.astype(jnp.float32), 1.0), from_start, to_end, flags)


def has(flags: Any, flag: int) -> Any:
    """Where a flag is set."""
    return (flags & flag) != 0
