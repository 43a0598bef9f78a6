"""A step of CEMA on Hopper: checks, the tiling, and the state as a reference."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.common.mosaic_gpu import interpret_params
from pallas_kernels.common.target import check_hopper
from pallas_kernels.state_step.block_sizes import THREADS, StepTiling, choose_tiling
from pallas_kernels.state_step.mosaic_gpu.launch import launch_step
from pallas_kernels.state_step.types import CemaStepTables, StateStepOutput

# Larger orders would not leave a row's state and the tables in registers.
LARGEST_ORDER = 16


def find_obstacle(x: Array, tables: CemaStepTables) -> str | None:
    """The reason why the kernel cannot take these operands; None if it can."""
    if x.dtype != jnp.bfloat16 or tables.p.dtype != jnp.float32:
        return f"takes bfloat16 x and float32 tables, these are {x.dtype} and {tables.p.dtype}"
    if x.shape[1] % THREADS or not x.size:
        return f"needs a multiple of {THREADS} channels and one row, x has shape {x.shape}"
    if tables.p.shape[0] > LARGEST_ORDER:
        return f"keeps up to {LARGEST_ORDER} orders in registers, tables have {tables.p.shape[0]}"
    return None


def state_step(
    x: Float[Array, "B D"],
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    active: Bool[Array, " B"] | None = None,
    *,
    tiling: StepTiling | None = None,
) -> StateStepOutput:
    """One kernel that updates the state in place. Arguments as in `api.state_step`.

    Args:
      x: bfloat16, a multiple of 128 channels.
      tables: float32.
      state: float32.
      active: rows that change.
      tiling: how rows and channels are divided into blocks; None: `choose_tiling`.

    Raises:
      ValueError: a shape or dtype that the kernel does not have, or a device that is no Hopper GPU.
    """
    check_hopper("mosaic_gpu")
    obstacle = find_obstacle(x, tables)
    if obstacle is not None:
        raise ValueError(f"state_step: mosaic_gpu {obstacle}; use implementation 'xla' or None")
    state_ref = jax.new_ref(state)
    tiling = tiling or choose_tiling(x.shape[0])
    y = launch_step(x, tables, state_ref, active, tiling, interpret=interpret_params())
    return StateStepOutput(y, jax.freeze(state_ref))
