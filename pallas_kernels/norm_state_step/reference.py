"""TimestepNorm and CEMA of one token a row, CEMA by its definition in complex numbers."""

from jaxtyping import Array, Bool, Float

from pallas_kernels.norm_state_step import xla
from pallas_kernels.norm_state_step.types import NormStateStepOutput, StepNorm
from pallas_kernels.state_step import CemaStepTables
from pallas_kernels.timestep_norm import TimestepNormState


def norm_state_step(
    x: Float[Array, "B D"],
    norm: StepNorm,
    norm_state: TimestepNormState,
    tables: CemaStepTables,
    state: Float[Array, "S 2N D"],
    active: Bool[Array, " B"] | None,
) -> NormStateStepOutput:
    """The definition in `api.norm_state_step`."""
    return xla.norm_state_step(
        x, norm, norm_state, tables, state, active, implementation="reference"
    )
