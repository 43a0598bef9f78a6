"""TimestepNorm by Triton: the check of the device and of the operands."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.target import is_interpreted
from pallas_kernels.common.triton import check_triton
from pallas_kernels.timestep_norm.row_splits.op import normalize_by_splits
from pallas_kernels.timestep_norm.row_splits.types import TILE, TimestepNormGpuOptions
from pallas_kernels.timestep_norm.triton.block_sizes import MAX_GROUP_FEATURES, choose_geometry
from pallas_kernels.timestep_norm.triton.launch import TRITON_KERNELS
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
) -> TimestepNormOutput:
    """The Triton kernels. Arguments as in `api.py`, with complete states.

    Lengths that are no multiple of 128 are padded in a copy of x. With `sequence_axis` the initial
    state is ignored.

    Raises:
      ValueError: float64, larger groups, no GPU or one older than Ampere, or triton
        or jax-triton is not installed.
    """
    check_triton("triton")
    B, L, D = x.shape
    features = D // num_groups
    if x.dtype == jnp.float64 or features > MAX_GROUP_FEATURES:
        raise ValueError(
            f"triton takes up to float32 and groups of at most {MAX_GROUP_FEATURES} features, x is "
            f"{x.dtype} with groups of {features}; use implementation 'xla'"
        )
    geometry = choose_geometry(B, L + -L % TILE, num_groups, features)
    options = TimestepNormGpuOptions(TRITON_KERNELS, eps, geometry, is_interpreted())
    return normalize_by_splits(
        options, x, scale, bias, initial_state, prior, segment_ids, sequence_axis
    )
