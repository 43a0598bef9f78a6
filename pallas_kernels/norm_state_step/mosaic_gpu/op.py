"""TimestepNorm and CEMA of one or a few tokens on Hopper: checks, and the states as references."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.common.mosaic_gpu import interpret_params
from pallas_kernels.common.target import check_hopper
from pallas_kernels.norm_state_step.mosaic_gpu.launch import (
    GROUPS,
    NormStateOperands,
    NormStates,
    launch_norm_state_steps,
)
from pallas_kernels.norm_state_step.types import (
    Counts,
    NormStateStepOutput,
    StepNorm,
    TargetRows,
)
from pallas_kernels.norm_state_step.xla import count_tokens
from pallas_kernels.state_step import CemaStepTables
from pallas_kernels.timestep_norm import TimestepNormState

# A warp has a group, a thread one or two of its channels: registers hold no more.
GROUP_SIZES = (32, 64)
LARGEST_ORDER = 16
# u and y of a row's tokens are in shared memory: 64 KB for groups of 64.
MOST_TOKENS = 64


def find_obstacle(x: Array, norm: StepNorm, tables: CemaStepTables) -> str | None:
    """The reason why the kernel cannot take these operands; None if it can."""
    if x.dtype != jnp.bfloat16 or tables.p.dtype != jnp.float32:
        return f"takes bfloat16 x and float32 tables, these are {x.dtype} and {tables.p.dtype}"
    size = x.shape[-1] // norm.num_groups
    if size not in GROUP_SIZES or norm.num_groups % GROUPS or not x.size:
        return (
            f"needs a multiple of {GROUPS} groups of 32 or 64 channels and one row; there are "
            f"{norm.num_groups} groups of {size}, x has shape {x.shape}"
        )
    if tables.p.shape[0] > LARGEST_ORDER:
        return f"keeps up to {LARGEST_ORDER} orders in registers, tables have {tables.p.shape[0]}"
    if x.ndim == 3 and x.shape[1] > MOST_TOKENS:
        return f"takes up to {MOST_TOKENS} tokens of a row, x has shape {x.shape}"
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
    _check_can_run("norm_state_step", x, norm, tables)
    rows = x.shape[0]
    is_active = jnp.ones(rows, bool) if active is None else active
    count = norm_state.count.at[:rows].add(is_active.astype(jnp.int32))
    states = _references(norm_state, state)
    u, y = launch_norm_state_steps(
        _operands(
            x[:, None],
            norm,
            tables,
            states,
            count,
            active=None if active is None else active.astype(jnp.int32),
        ),
        norm.eps,
        rows_per_block or _choose_rows_per_block(rows),
        interpret=interpret_params(),
    )
    return NormStateStepOutput(u[:, 0], y[:, 0], *_freeze(states, count))


def norm_state_steps(
    x: Float[Array, "B T D"],
    norm: StepNorm,
    norm_state: TimestepNormState,
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    counts: Counts = None,
    target: TargetRows | None = None,
) -> NormStateStepOutput:
    """One kernel that updates the states in place. Arguments as in `api.norm_state_steps`.

    Raises:
      ValueError: as in `norm_state_step`.
    """
    _check_can_run("norm_state_steps", x, norm, tables)
    rows = x.shape[0]
    if counts is None:
        # As an array: one kernel for any counts, whose registers hold 64 channels of a group.
        counts = jnp.full(rows, x.shape[1], jnp.int32)
    writes_nothing = isinstance(counts, int)
    given, updated = _by_group(norm_state, state), None
    if target is not None:
        updated = _references(target.norm, target.state)
    elif not writes_nothing:
        given = _references(norm_state, state)
    u, y = launch_norm_state_steps(
        _operands(
            x,
            norm,
            tables,
            given,
            norm_state.count + 1,
            counts=None if writes_nothing else counts,
            target=updated,
            first_row=None if target is None else jnp.reshape(target.first_row, 1),
        ),
        norm.eps,
        _choose_rows_per_block(rows),
        writes_nothing,
        interpret=interpret_params(),
    )
    if writes_nothing:
        return NormStateStepOutput(u, y, norm_state, state)
    count = count_tokens(norm_state.count, counts, rows, target)
    return NormStateStepOutput(u, y, *_freeze(updated or given, count))


def _check_can_run(name: str, x: Array, norm: StepNorm, tables: CemaStepTables) -> None:
    check_hopper("mosaic_gpu")
    obstacle = find_obstacle(x, norm, tables)
    if obstacle is not None:
        raise ValueError(f"{name}: mosaic_gpu {obstacle}; use implementation 'xla' or None")


def _choose_rows_per_block(rows: int) -> int:
    return max(1, min(4, rows // 32))


def _operands(
    x: Float[Array, "B T D"],
    norm: StepNorm,
    tables: CemaStepTables,
    states: NormStates,
    count: Int32[Array, " S"],
    **options: Any,
) -> NormStateOperands:
    """The kernel's operands, with channels by group."""
    split = partial(_split, groups=norm.num_groups)
    by_group: Any = map(split, tables)
    return NormStateOperands(
        split(x),
        split(norm.scale),
        split(norm.bias),
        CemaStepTables(*by_group),
        states,
        count,
        **options,
    )


def _split(array: Array | None, *, groups: int) -> Array | None:
    return None if array is None else array.reshape(*array.shape[:-1], groups, -1)


def _by_group(norm_state: TimestepNormState, state: Array) -> NormStates:
    groups = norm_state.mean.shape[1]
    return NormStates(_split(state, groups=groups), norm_state.mean, norm_state.var)


def _references(norm_state: TimestepNormState, state: Array) -> NormStates:
    return NormStates(*map(jax.new_ref, _by_group(norm_state, state)))


def _freeze(
    references: NormStates, count: Int32[Array, " S"]
) -> tuple[TimestepNormState, Float[Array, "S 2N D"]]:
    new, mean, var = map(jax.freeze, references)
    return TimestepNormState(count, mean, var), new.reshape(*new.shape[:2], -1)
