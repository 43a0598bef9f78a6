"""TimestepNorm and CEMA of one token on Hopper: checks, and the states as references."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.common.mosaic_gpu import interpret_params
from pallas_kernels.common.target import check_hopper
from pallas_kernels.norm_state_step.mosaic_gpu.launch import (
    GROUPS,
    NormStateOperands,
    launch_norm_state_step,
)
from pallas_kernels.norm_state_step.types import NormStateStepOutput, StepNorm
from pallas_kernels.state_step import CemaStepTables
from pallas_kernels.timestep_norm import TimestepNormState

# A warp has a group, a thread one or two of its channels: registers hold no more.
GROUP_SIZES = (32, 64)
LARGEST_ORDER = 16


def find_obstacle(x: Array, norm: StepNorm, tables: CemaStepTables) -> str | None:
    """The reason why the kernel cannot take these operands; None if it can."""
    if x.dtype != jnp.bfloat16 or tables.p.dtype != jnp.float32:
        return f"takes bfloat16 x and float32 tables, these are {x.dtype} and {tables.p.dtype}"
    size = x.shape[1] // norm.num_groups
    if size not in GROUP_SIZES or norm.num_groups % GROUPS or not x.size:
        return (
            f"needs a multiple of {GROUPS} groups of 32 or 64 channels and one row; there are "
            f"{norm.num_groups} groups of {size}, x has shape {x.shape}"
        )
    if tables.p.shape[0] > LARGEST_ORDER:
        return f"keeps up to {LARGEST_ORDER} orders in registers, tables have {tables.p.shape[0]}"
    return None


def norm_state_step(
    x: Float[Array, "B D"],
    norm: StepNorm,
    norm_state: TimestepNormState,
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    active: Bool[Array, " B"] | None = None,
    *,
    rows_per_block: int | None = None,
) -> NormStateStepOutput:
    """One kernel that updates the states in place. Arguments as in `api.norm_state_step`.

    Args:
      x: bfloat16.
      norm: parameters.
      norm_state: moments.
      tables: float32.
      state: float32.
      active: rows that change.
      rows_per_block: rows of a block, which loads the tables once; None: by the number of rows.

    Raises:
      ValueError: a shape or dtype that the kernel does not have, or a device that is no Hopper GPU.
    """
    check_hopper("mosaic_gpu")
    obstacle = find_obstacle(x, norm, tables)
    if obstacle is not None:
        raise ValueError(
            f"norm_state_step: mosaic_gpu {obstacle}; use implementation 'xla' or None"
        )
    rows, groups = x.shape[0], norm.num_groups
    is_active = jnp.ones(rows, bool) if active is None else active
    count = norm_state.count.at[:rows].add(is_active.astype(jnp.int32))

    def by_group(array: Array | None) -> Array | None:
        return None if array is None else array.reshape(*array.shape[:-1], groups, -1)

    state_ref = jax.new_ref(by_group(state))
    mean_ref, var_ref = jax.new_ref(norm_state.mean), jax.new_ref(norm_state.var)
    operands = NormStateOperands(
        by_group(x),
        by_group(norm.scale),
        by_group(norm.bias),
        CemaStepTables(*map(by_group, tables)),  # pyright: ignore[reportArgumentType]
        state_ref,
        mean_ref,
        var_ref,
        count,
        None if active is None else active.astype(jnp.int32),
    )
    u, y = launch_norm_state_step(
        operands,
        norm.eps,
        rows_per_block or max(1, min(4, rows // 32)),
        interpret=interpret_params(),
    )
    return NormStateStepOutput(
        u,
        y,
        TimestepNormState(count, jax.freeze(mean_ref), jax.freeze(var_ref)),
        jax.freeze(state_ref).reshape(state.shape),
    )
