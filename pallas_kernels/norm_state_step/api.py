"""The public function of TimestepNorm and CEMA of one token: choose an implementation, call it."""

from collections.abc import Callable

from jaxtyping import Array, Bool, Float

from pallas_kernels.common.dispatch import Implementation, check_implementation
from pallas_kernels.common.symbolic import has_symbolic_shape
from pallas_kernels.common.target import find_target
from pallas_kernels.norm_state_step import reference, xla
from pallas_kernels.norm_state_step.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.norm_state_step.types import NormStateStepOutput, StepNorm
from pallas_kernels.state_step import CemaStepTables
from pallas_kernels.timestep_norm import TimestepNormState

# All called as f(x, norm, norm_state, tables, state, active).
IMPLEMENTATIONS: dict[str, Callable[..., NormStateStepOutput]] = {
    "reference": reference.norm_state_step,
    "xla": xla.norm_state_step,
    "mosaic_gpu": mosaic_gpu.norm_state_step,
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
    _check_operands(x, norm, norm_state, state)
    check_implementation("norm_state_step", implementation, IMPLEMENTATIONS)
    if implementation is not None:
        return IMPLEMENTATIONS[implementation](x, norm, norm_state, tables, state, active)
    if _has_kernel(x, norm, tables):
        return mosaic_gpu.norm_state_step(x, norm, norm_state, tables, state, active)
    # CEMA's step may have its own kernel, for other groups of channels.
    return xla.norm_state_step(x, norm, norm_state, tables, state, active, implementation=None)


def _has_kernel(x: Array, norm: StepNorm, tables: CemaStepTables) -> bool:
    if has_symbolic_shape(x):
        return False
    return find_target().is_hopper and mosaic_gpu.find_obstacle(x, norm, tables) is None


def _check_operands(x: Array, norm: StepNorm, norm_state: TimestepNormState, state: Array) -> None:
    if x.ndim != 2 or x.shape[1] % norm.num_groups:
        raise ValueError(f"x has shape {x.shape}; needs (B, D) with D in {norm.num_groups} groups")
    if norm_state.mean.ndim != 2 or norm_state.mean.shape[1] != norm.num_groups:
        raise ValueError(
            f"norm_state.mean has shape {norm_state.mean.shape}; needs (S, {norm.num_groups})"
        )
    if norm_state.mean.shape[0] != state.shape[0]:
        raise ValueError(
            f"norm_state has {norm_state.mean.shape[0]} rows, state {state.shape[0]}; use the same"
        )
