"""TimestepNorm and CEMA of one token a row, on states that are updated in place."""

from pallas_kernels.norm_state_step.api import norm_state_step
from pallas_kernels.norm_state_step.types import NormStateStepOutput, StepNorm

__all__ = ["NormStateStepOutput", "StepNorm", "norm_state_step"]
