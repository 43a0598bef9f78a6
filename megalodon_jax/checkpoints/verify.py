"""Verification of all checkpoints of a run, without loading them."""

from typing import NamedTuple

from megalodon_jax.checkpoints.manifest import verify_checkpoint
from megalodon_jax.checkpoints.reading import CheckpointReader
from megalodon_jax.errors import (
    CheckpointError,
    IncompleteCheckpointError,
    StoreUnreachableError,
)
from megalodon_jax.storage.location import AnyPath


class CheckpointReport(NamedTuple):
    """The state of one checkpoint.

    Attributes:
      step: its step.
      state: "good", "damaged", or "incomplete" (without manifest).
      details: number of files, size and time if its manifest could be read, else why not.
      problems: one text per file that is damaged, missing or not listed.
    """

    step: int
    state: str
    details: str
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"step {self.step}: {self.state} ({self.details})"]
        return "\n  ".join([*lines, *self.problems])


def verify_run(run_dir: str | AnyPath) -> list[CheckpointReport]:
    """Compares every checkpoint of a run with its manifest, in ascending order of steps.

    Writes nothing and takes no lock, so that a run may be verified while it trains.

    Raises:
      CheckpointError: the directory has no checkpoints.
    """
    reader = CheckpointReader(run_dir)
    steps = reader.steps()
    if not steps:
        raise CheckpointError(
            f"{run_dir} has no checkpoints; give the run_dir of a training run that has saved"
        )
    return [_report(reader, step) for step in steps]


def _report(reader: CheckpointReader, step: int) -> CheckpointReport:
    try:
        result = verify_checkpoint(reader.files_of(step), step)
    except IncompleteCheckpointError as error:
        return CheckpointReport(step, "incomplete", str(error))
    except StoreUnreachableError:
        raise
    except CheckpointError as error:
        return CheckpointReport(step, "damaged", str(error))
    return CheckpointReport(
        step, "damaged" if result.problems else "good", str(result), result.problems
    )
