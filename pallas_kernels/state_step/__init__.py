"""One token of CEMA a row, on a state with channels last that is updated in place."""

from pallas_kernels.state_step.api import state_step
from pallas_kernels.state_step.tables import cema_step_tables, pack_state, unpack_state
from pallas_kernels.state_step.types import CemaStepTables, StateStepOutput

__all__ = [
    "CemaStepTables",
    "StateStepOutput",
    "cema_step_tables",
    "pack_state",
    "state_step",
    "unpack_state",
]
