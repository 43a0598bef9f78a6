"""The public function of a step of CEMA: check, choose an implementation, call it."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.common.dispatch import Implementation, check_implementation
from pallas_kernels.common.symbolic import has_symbolic_shape
from pallas_kernels.common.target import find_target
from pallas_kernels.state_step import reference, xla
from pallas_kernels.state_step.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.state_step.types import CemaStepTables, StateStepOutput

# All called as f(x, tables, state, active).
IMPLEMENTATIONS: dict[str, Callable[..., StateStepOutput]] = {
    "reference": reference.state_step,
    "xla": xla.state_step,
    "mosaic_gpu": mosaic_gpu.state_step,
}


def state_step(
    x: Float[Array, "B D"],
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    active: Bool[Array, " B"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> StateStepOutput:
    """One token of complex EMA a row: h = q·h + p·x,  y = Re(Σ_n g_n·h_n) + omega·x.

    Ma et al. 2024, eq. 2-3, with the coefficients of `cema_step_tables`; the same as
    `pallas_kernels.cema` over one token. Under `jax.jit` with a donated state, or in the carry of
    `jax.lax.scan`, the Hopper kernel updates the state in place.

    Args:
      x: one token of every row, bfloat16, float32 or float64; computed in the tables' dtype.
      tables: from `cema_step_tables`.
      state: S >= B rows of `pack_state`, of the tables' dtype. Row i belongs to token i; rows from
        B on are neither read nor changed.
      active: rows whose state changes; the y of others has no meaning. None: all.
      implementation: "reference" (complex numbers, by definition), "xla" (any platform and dtype),
        "mosaic_gpu" (a kernel for NVIDIA Hopper; bfloat16 x, a multiple of 128 channels, up to 16
        orders), or None for the fastest known here.

    Returns:
      y in x's dtype, and the next state.

    Raises:
      ValueError: shapes or dtypes do not fit together, the implementation does not exist or cannot
        run these operands on this device.
    """
    _check_operands(x, tables, state)
    if active is not None and (active.shape != x.shape[:1] or active.dtype != jnp.bool_):
        raise ValueError(f"active is {active.dtype}{active.shape}; needs bool({x.shape[0]},)")
    check_implementation("state_step", implementation, IMPLEMENTATIONS)
    implementation = implementation or _choose_implementation(x, tables)
    return IMPLEMENTATIONS[implementation](x, tables, state, active)


def _choose_implementation(x: Array, tables: CemaStepTables) -> Implementation:
    """The kernel where it runs: XLA moves the state twice, as it cannot update it in place."""
    if has_symbolic_shape(x):
        return "xla"
    can_run = find_target().is_hopper and mosaic_gpu.find_obstacle(x, tables) is None
    return "mosaic_gpu" if can_run else "xla"


def _check_operands(x: Array, tables: CemaStepTables, state: Array) -> None:
    if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise ValueError(f"x is {x.dtype}{x.shape}; needs bfloat16, float32 or float64 (B, D)")
    order, channels = tables.q_re.shape[0], x.shape[1]
    for name, table in zip(CemaStepTables._fields, tables, strict=True):
        expected = (channels,) if name == "omega" else (order, channels)
        if table.shape != expected or table.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"tables.{name} is {table.dtype}{table.shape}; x {x.shape} and q_re "
                f"{tables.q_re.shape} need float32 or float64 {expected}"
            )
    if (
        state.ndim != 3
        or state.shape[0] < x.shape[0]
        or state.shape[1:] != (2 * order, channels)
        or state.dtype != tables.q_re.dtype
    ):
        raise ValueError(
            f"state is {state.dtype}{state.shape}; needs {tables.q_re.dtype}"
            f"(S, {2 * order}, {channels}) with S >= {x.shape[0]}: use pack_state"
        )
