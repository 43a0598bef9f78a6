"""TimestepNorm: group normalization by the moments of all tokens so far."""

from pallas_kernels.timestep_norm.api import timestep_norm
from pallas_kernels.timestep_norm.step import (
    TimestepNormSteps,
    timestep_norm_step,
    timestep_norm_steps,
)
from pallas_kernels.timestep_norm.types import (
    TimestepNormOutput,
    TimestepNormState,
    broadcast_to_rows,
)

__all__ = [
    "TimestepNormOutput",
    "TimestepNormState",
    "TimestepNormSteps",
    "broadcast_to_rows",
    "timestep_norm",
    "timestep_norm_step",
    "timestep_norm_steps",
]
