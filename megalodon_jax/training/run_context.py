"""The fixed objects of a run, its log, and the settings that a resumed run has changed."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optax
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.config import TrainConfig
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.errors import CheckpointError, RunLockedError, TrainingError, one_line
from megalodon_jax.parallel import distributed
from megalodon_jax.tasks import HeldoutLoader, Task, TrainingLoader
from megalodon_jax.training.callbacks import Callback
from megalodon_jax.training.metrics import ProgressDisplay, RunLog
from megalodon_jax.training.run_time import RunTime
from megalodon_jax.training.signals import StopRequest
from megalodon_jax.training.step_trace import StepTrace
from megalodon_jax.training.watchdog import Watchdog
from megalodon_jax.training.writers import MetricWriter


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
    """The fixed objects of a run.

    Attributes:
      config: the run's settings.
      mesh: the run's devices.
      rows: rows of the global batch that this process loads.
      task: examples, loss and metric.
      tokenizer: the run's tokenizer.
      loader: endless training batches.
      optimizer: the run's own optimizer; None: that of `config.optim`.
      heldout_loaders: single held-out passes by name; none without held-out data.
      graphdef: the model's static structure.
      checkpoints: the run's checkpoints.
      log: output of metrics; None except in process 0.
      display: progress on the terminal.
      run_time: seconds of every phase.
      watchdog: ends a process that hangs.
      trace: the profiler's trace of some steps.
      stop: a request to stop.
      callbacks: the caller's code at the events of the run.
    """

    config: TrainConfig
    mesh: Mesh
    rows: tuple[int, ...]
    task: Task
    tokenizer: Tokenizer
    loader: TrainingLoader
    optimizer: optax.GradientTransformation | None
    heldout_loaders: Mapping[str, HeldoutLoader]
    graphdef: nnx.GraphDef
    checkpoints: RunCheckpoints
    log: RunLog | None
    display: ProgressDisplay
    run_time: RunTime
    watchdog: Watchdog
    trace: StepTrace
    stop: StopRequest
    callbacks: Sequence[Callback]


@contextmanager
def open_log(
    config: TrainConfig,
    directory: Path,
    *,
    first_step: int,
    writers: Sequence[MetricWriter] | None = None,
) -> Iterator[RunLog | None]:
    """The run's log in a local directory, with its resolved configuration beside it.

    None except in process 0.
    """
    if not distributed.is_main():
        yield None
        return
    resolved = dataclasses.asdict(config)
    (directory / "config.json").write_text(json.dumps(resolved, indent=2) + "\n")
    log = RunLog(
        directory,
        config=resolved,
        first_step=first_step,
        wandb_project=config.wandb_project,
        writers=writers,
    )
    try:
        yield log
    finally:
        log.close()


def describe_saved(checkpoints: RunCheckpoints, config: TrainConfig) -> str:
    """Says which checkpoint is saved, and how to go on."""
    if not (steps := checkpoints.complete_steps()):
        return "nothing saved"
    return f"checkpoint of step {steps[-1]} saved in {config.run_dir}, resume with --resume"


@contextmanager
def name_checkpoint_of_failure(config: TrainConfig, checkpoints: RunCheckpoints) -> Iterator[None]:
    """Adds to an error of the file system what is saved.

    Raises:
      TrainingError: an `OSError` was raised inside.
    """
    try:
        yield
    except OSError as error:
        try:
            checkpoints.wait()
            saved = describe_saved(checkpoints, config)
        except OSError:
            saved = f"{config.run_dir} cannot be read"
        except (CheckpointError, RunLockedError) as of_save:
            saved = str(of_save)
        raise TrainingError(
            f"the run in {config.run_dir} cannot continue: {one_line(error)}; {saved}"
        ) from error


def changed_settings(saved: TrainConfig, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of the optimizer, its schedule, the guard and the rows that differ: old and new."""
    names = (
        "steps", "seed", "z_loss", "max_skipped_updates", "on_spike", "spike_window",
        "spike_threshold",
    )  # fmt: skip
    pairs = {name: (getattr(saved, name), getattr(config, name)) for name in names}
    for name in ("carry_state", "batch_size"):
        pairs[f"data.{name}"] = (getattr(saved.data, name), getattr(config.data, name))
    for entry in dataclasses.fields(config.optim):
        values = (getattr(saved.optim, entry.name), getattr(config.optim, entry.name))
        pairs[f"optim.{entry.name}"] = values
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}
