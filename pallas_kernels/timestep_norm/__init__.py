"""TimestepNorm: group normalization by the moments of all tokens so far."""

from pallas_kernels.timestep_norm.api import timestep_norm
from pallas_kernels.timestep_norm.types import (
    TimestepNormOutput,
    TimestepNormState,
    before_rows,
)

__all__ = ["TimestepNormOutput", "TimestepNormState", "before_rows", "timestep_norm"]
