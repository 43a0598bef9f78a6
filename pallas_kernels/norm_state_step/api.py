"""The public functions of TimestepNorm and CEMA of tokens: choose an implementation, call it."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.common.dispatch import Implementation, check_implementation
from pallas_kernels.common.symbolic import has_symbolic_shape
from pallas_kernels.common.target import find_target
from pallas_kernels.norm_state_step import reference, xla
from pallas_kernels.norm_state_step.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.norm_state_step.types import (
    Counts,
    NormStateStepOutput,
    StepNorm,
    TargetRows,
)
from pallas_kernels.state_step import CemaStepTables
from pallas_kernels.timestep_norm import TimestepNormState

# All called as f(x, norm, norm_state, tables, state, active).
IMPLEMENTATIONS: dict[str, Callable[..., NormStateStepOutput]] = {
    "reference": reference.norm_state_step,
    "xla": xla.norm_state_step,
    "mosaic_gpu": mosaic_gpu.norm_state_step,
}
# All called as f(x, norm, norm_state, tables, state, counts, target).
STEPS_IMPLEMENTATIONS: dict[str, Callable[..., NormStateStepOutput]] = {
    "reference": reference.norm_state_steps,
    "xla": xla.norm_state_steps,
    "mosaic_gpu": mosaic_gpu.norm_state_steps,
}


def norm_state_step(
    x: Float[Array, "B D"],
    norm: StepNorm,
    norm_state: TimestepNormState,
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    active: Bool[Array, " B"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> NormStateStepOutput:
    """`timestep_norm_step` and `state_step` of its result: the start of a block while decoding.

    Under `jax.jit` with donated states, or in the carry of `jax.lax.scan`, the Hopper kernel
    updates them in place.

    Args:
      x: one token of every row, bfloat16 or float32.
      norm: TimestepNorm's parameters.
      norm_state: moments of S >= B rows; rows from B on stay.
      tables: CEMA's coefficients.
      state: CEMA's state of S rows, as in `state_step`.
      active: rows whose states change; the u and y of others have no meaning. None: all.
      implementation: "reference", "xla" (any platform and dtype), "mosaic_gpu" (one kernel for
        NVIDIA Hopper; bfloat16 x, groups of 32 or 64 channels, a multiple of 4 groups, up to 16
        orders), or None for the fastest known here.

    Returns:
      The normalized tokens, CEMA's outputs and the next states.

    Raises:
      ValueError: shapes or dtypes do not fit together, the implementation does not exist or cannot
        run these operands on this device.
    """
    _check_operands(x, norm, norm_state, state, "B D")
    check_implementation("norm_state_step", implementation, IMPLEMENTATIONS)
    if implementation is not None:
        return IMPLEMENTATIONS[implementation](x, norm, norm_state, tables, state, active)
    if _has_kernel(x, norm, tables):
        return mosaic_gpu.norm_state_step(x, norm, norm_state, tables, state, active)
    # CEMA's step may have its own kernel, for other groups of channels.
    return xla.norm_state_step(x, norm, norm_state, tables, state, active, implementation=None)


def norm_state_steps(
    x: Float[Array, "B T D"],
    norm: StepNorm,
    norm_state: TimestepNormState,
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    counts: Counts = None,
    *,
    target: TargetRows | None = None,
    implementation: Implementation | None = None,
) -> NormStateStepOutput:
    """T successive calls of `norm_state_step`, of which the first few change the states.

    In place as `norm_state_step`; with a target, in the target's arrays.

    Args:
      x: T >= 1 successive tokens of every row, bfloat16 or float32.
      norm: TimestepNorm's parameters.
      norm_state: moments of S >= B rows before the first token.
      tables: CEMA's coefficients.
      state: CEMA's state of S rows before the first token.
      counts: tokens of each row after which its states are kept, 0 (they stay) to T; u and y are
        those of all T tokens whatever the counts. None: all T tokens of every row. The Python
        number 0: no row's states change, and the kernel writes none.
      target: rows that take the states after the counted tokens; `norm_state` and `state` then
        stay, and need not be donated. None: rows 0..B-1 of those.
      implementation: as in `norm_state_step`; "mosaic_gpu" takes up to 64 tokens of a row.

    Returns:
      The normalized tokens and CEMA's outputs (B, T, D), and the next states: the target's arrays
      if there is one.

    Raises:
      ValueError: as in `norm_state_step`; counts are neither of B rows nor 0.
    """
    _check_operands(x, norm, norm_state, state, "B T D")
    _check_counts(x, counts, target)
    if target is not None:
        _check_operands(x, norm, target.norm, target.state, "B T D")
    check_implementation("norm_state_steps", implementation, STEPS_IMPLEMENTATIONS)
    if implementation is None:
        implementation = "mosaic_gpu" if _has_kernel(x, norm, tables) else "xla"
    steps = STEPS_IMPLEMENTATIONS[implementation]
    return steps(x, norm, norm_state, tables, state, counts, target)


def _has_kernel(x: Array, norm: StepNorm, tables: CemaStepTables) -> bool:
    if has_symbolic_shape(x):
        return False
    return find_target().is_hopper and mosaic_gpu.find_obstacle(x, norm, tables) is None


def _check_counts(x: Array, counts: Counts, target: TargetRows | None) -> None:
    if isinstance(counts, int):
        if counts != 0 or target is not None:
            raise ValueError(
                f"counts is the number {counts}; use an int32 array ({x.shape[0]},), None for all "
                "tokens, or 0, without a target, for no change of the states"
            )
    elif counts is not None and (counts.shape != x.shape[:1] or counts.dtype != jnp.int32):
        raise ValueError(f"counts is {counts.dtype}{counts.shape}; needs int32({x.shape[0]},)")


def _check_operands(
    x: Array, norm: StepNorm, norm_state: TimestepNormState, state: Array, axes: str
) -> None:
    if x.ndim != len(axes.split()) or x.shape[-1] % norm.num_groups or 0 in x.shape[1:]:
        expected = f"({', '.join(axes.split())})"
        raise ValueError(
            f"x has shape {x.shape}; needs {expected} with D in {norm.num_groups} groups"
        )
    if norm_state.mean.ndim != 2 or norm_state.mean.shape[1] != norm.num_groups:
        raise ValueError(
            f"norm_state.mean has shape {norm_state.mean.shape}; needs (S, {norm.num_groups})"
        )
    if norm_state.mean.shape[0] != state.shape[0]:
        raise ValueError(
            f"norm_state has {norm_state.mean.shape[0]} rows, state {state.shape[0]}; use the same"
        )
