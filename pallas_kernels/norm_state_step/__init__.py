"""TimestepNorm and CEMA of one or a few tokens a row, on states that are updated in place."""

from pallas_kernels.norm_state_step.api import norm_state_step, norm_state_steps
from pallas_kernels.norm_state_step.types import NormStateStepOutput, StepNorm, TargetRows

__all__ = ["NormStateStepOutput", "StepNorm", "TargetRows", "norm_state_step", "norm_state_steps"]
