"""Studies: a grid of training runs, run one after another or one per device, with a table of all.

`definition` reads a study's file, `schedule` runs it, `results` and `report` make its table,
`plots` its pictures.
"""

from megalodon_jax.study.definition import Run, Stage, Study, Variant, read_study, stage_runs
from megalodon_jax.study.results import RunResult, StudyResults, read_results
from megalodon_jax.study.schedule import run_study

__all__ = [
    "Run",
    "RunResult",
    "Stage",
    "Study",
    "StudyResults",
    "Variant",
    "read_results",
    "read_study",
    "run_study",
    "stage_runs",
]
