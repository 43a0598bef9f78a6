"""Loading of models and parameters from run directories, and saving of models."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.checkpoints.manager import RunCheckpoints
from megalodon_jax.config import TrainConfig
from megalodon_jax.data.tokenizer import Tokenizer, load_tokenizer
from megalodon_jax.errors import CheckpointError, MismatchError
from megalodon_jax.language_model import LanguageModel


class LoadedModel(NamedTuple):
    """A trained model and its training configuration."""

    model: LanguageModel
    config: TrainConfig


class TrainedModel(NamedTuple):
    """A trained model and the tokenizer it was trained with."""

    model: LanguageModel
    tokenizer: Tokenizer


def save_model(model: LanguageModel, run_dir: str | Path, config: TrainConfig) -> None:
    """Saves a model as a run directory for generation, evaluation and `init_from`.

    Raises:
      CheckpointError: `run_dir` already has checkpoints, or the save failed.
      DataError: the tokenizer of `config` cannot be read.
    """
    fingerprint = load_tokenizer(config.data.tokenizer).fingerprint()
    with RunCheckpoints(run_dir) as checkpoints:
        if steps := checkpoints.steps():
            raise CheckpointError(
                f"{run_dir} already has checkpoints (newest: step {steps[-1]}); give another "
                "directory"
            )
        params = nnx.state(model, nnx.Param)
        checkpoints.save_params(params, config=config, tokenizer_fingerprint=fingerprint)
        checkpoints.wait()


def load_params(run_dir: str | Path, config: TrainConfig, mesh: Mesh) -> nnx.State:
    """The newest parameters of another run, sharded over `mesh` for a run of `config`.

    Raises:
      CheckpointError: the run has no readable checkpoint.
      MismatchError: the checkpoint is of another model.
    """
    with RunCheckpoints(run_dir, read_only=True) as checkpoints:
        return load_latest_valid(
            checkpoints, lambda step: checkpoints.restore_params(step, config, mesh)
        )


def load_model(run_dir: str | Path, step: int | None = None) -> LoadedModel:
    """The model of a training run.

    Args:
      run_dir: the run's directory.
      step: step of the checkpoint; None: the newest readable one.

    Raises:
      CheckpointError: the run has no readable checkpoint.
    """
    with RunCheckpoints(run_dir, read_only=True) as checkpoints:

        def load(at: int) -> LoadedModel:
            config, _ = checkpoints.read_run(at)
            return LoadedModel(checkpoints.restore_model(at, config.model), config)

        return load_latest_valid(checkpoints, load, step=step)


def load_trained(run_dir: str | Path, step: int | None = None) -> TrainedModel:
    """The model of a training run and its tokenizer; arguments as for `load_model`.

    Raises:
      CheckpointError: the run has no readable checkpoint.
      MismatchError: the tokenizer file has changed since training.
      DataError: the tokenizer file cannot be read.
    """
    with RunCheckpoints(run_dir, read_only=True) as checkpoints:

        def load(at: int) -> TrainedModel:
            config, fingerprint = checkpoints.read_run(at)
            tokenizer = load_tokenizer(config.data.tokenizer)
            if tokenizer.fingerprint() != fingerprint:
                raise MismatchError(
                    f"{run_dir} was trained with tokenizer {fingerprint}, but "
                    f"{config.data.tokenizer!r} is now {tokenizer.fingerprint()}; restore the "
                    "original file"
                )
            return TrainedModel(checkpoints.restore_model(at, config.model), tokenizer)

        return load_latest_valid(checkpoints, load, step=step)


def load_latest_valid[T](
    checkpoints: RunCheckpoints,
    load: Callable[[int], T],
    *,
    step: int | None = None,
    on_damaged: Callable[[int, CheckpointError], None] | None = None,
) -> T:
    """Applies `load` to the newest checkpoint that is not damaged, or to that of `step`.

    Damaged checkpoints are reported on stderr and passed to `on_damaged`.

    Raises:
      CheckpointError: no checkpoint can be read.
      MismatchError: the newest readable checkpoint is of another model or other data.
    """
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(
            f"{checkpoints.directory} has no complete checkpoint to resume from; train without "
            "--resume, or give another run_dir"
        )
    if step is not None:
        if step not in steps:
            raise CheckpointError(
                f"{checkpoints.directory} has no checkpoint of step {step}; there are: "
                f"{', '.join(map(str, steps))}"
            )
        return load(step)
    for at in reversed(steps):
        try:
            return load(at)
        except MismatchError:
            raise
        except CheckpointError as error:
            print(f"damaged checkpoint, trying the previous one: {error}", file=sys.stderr)
            if on_damaged is not None:
                on_damaged(at, error)
    raise CheckpointError(
        f"no checkpoint in {checkpoints.directory} can be read; the errors above give the reasons"
    )
