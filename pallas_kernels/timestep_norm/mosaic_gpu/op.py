"""TimestepNorm on Hopper GPUs: the check of the device and of the operands."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.mosaic_gpu import interpret_params
from pallas_kernels.common.target import check_hopper_or_blackwell
from pallas_kernels.timestep_norm.mosaic_gpu.block_sizes import (
    FEATURE_MULTIPLE,
    MAX_GROUP_FEATURES,
    SHARED_MEMORY,
    choose_geometry,
)
from pallas_kernels.timestep_norm.mosaic_gpu.launch import MOSAIC_GPU_KERNELS
from pallas_kernels.timestep_norm.row_splits.op import normalize_by_splits
from pallas_kernels.timestep_norm.row_splits.types import TILE, TimestepNormGpuOptions
from pallas_kernels.timestep_norm.types import TimestepNormOutput, TimestepNormState


def timestep_norm(
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    num_groups: int,
    eps: float,
    initial_state: TimestepNormState,
    prior: TimestepNormState,
    segment_ids: Int32[Array, "B L"] | None,
    sequence_axis: str | None = None,
    *,
    split: int | None = None,
    groups_per_block: int | None = None,
) -> TimestepNormOutput:
    """The Hopper kernels. Arguments as in `api.py`, with complete states.

    Lengths that are no multiple of 128, and groups of no multiple of 16 features, are padded in a
    copy of x. With `sequence_axis` the initial state is ignored.

    `split` is the number of tokens that one warpgroup works on, a multiple of 128, and
    `groups_per_block` the number of groups, a divisor of `num_groups`; None for measured choices.

    Raises:
      ValueError: another dtype, larger groups, or a target that is not a Hopper GPU.
    """
    check_hopper_or_blackwell("mosaic_gpu", shared_memory=SHARED_MEMORY)
    B, L, D = x.shape
    features = D // num_groups
    _check_supported(x, features)
    geometry = choose_geometry(
        B, L + -L % TILE, num_groups, features, split=split, groups_per_block=groups_per_block
    )
    options = TimestepNormGpuOptions(MOSAIC_GPU_KERNELS, eps, geometry, interpret_params())
    return normalize_by_splits(
        options, x, scale, bias, initial_state, prior, segment_ids, sequence_axis
    )


def _check_supported(x: Array, features: int) -> None:
    if x.dtype not in (jnp.bfloat16, jnp.float32) or features > MAX_GROUP_FEATURES:
        raise ValueError(
            "mosaic_gpu takes bfloat16 or float32 and groups of at most "
            f"{MAX_GROUP_FEATURES} features, x is {x.dtype} with groups of {features}; use "
            "implementation 'xla'"
        )


def is_faster(x: Float[Array, "B L D"], num_groups: int) -> bool:
    """Whether the kernels beat `xla` on a Hopper GPU; not measured for fewer tokens or float32."""
    features = x.shape[2] // num_groups
    is_supported = features <= MAX_GROUP_FEATURES and features % FEATURE_MULTIPLE == 0
    return x.dtype == jnp.bfloat16 and is_supported and x.shape[1] >= TILE
