"""Models and parameters from run directories, and back."""

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
from megalodon_jax.model import Megalodon


class LoadedModel(NamedTuple):
    """A trained model and the configuration it was trained with."""

    model: Megalodon
    config: TrainConfig


class TrainedModel(NamedTuple):
    """A trained model and the tokenizer whose ids it knows."""

    model: Megalodon
    tokenizer: Tokenizer


def save_model(model: Megalodon, run_dir: str | Path, config: TrainConfig) -> None:
    """Writes a model as a run that `load_model`, `generate`, `evaluate` and `init_from` can use.

    Raises:
      CheckpointError: `run_dir` has checkpoints already, or the save failed.
      DataError: the tokenizer that `config` names cannot be read.
    """
    fingerprint = load_tokenizer(config.data.tokenizer).fingerprint()
    with RunCheckpoints(run_dir) as checkpoints:
        if steps := checkpoints.steps():
            raise CheckpointError(f"{run_dir} has checkpoints already (newest: step {steps[-1]})")
        params = nnx.state(model, nnx.Param)
        checkpoints.save_params(params, config=config, tokenizer_fingerprint=fingerprint)
        checkpoints.wait()


def load_params(run_dir: str | Path, config: TrainConfig, mesh: Mesh) -> nnx.State:
    """The newest parameters of another run, where a run of `config` has them on `mesh`.

    Raises:
      CheckpointError: there are none, or they cannot be read.
      MismatchError: they are of another model.
    """
    with RunCheckpoints(run_dir, read_only=True) as checkpoints:
        return load_latest_valid(
            checkpoints, lambda step: checkpoints.restore_params(step, config, mesh)
        )


def load_model(run_dir: str | Path, step: int | None = None) -> LoadedModel:
    """The model of a training run.

    Args:
      run_dir: the run's directory.
      step: which checkpoint; None: the newest that can be read.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    with RunCheckpoints(run_dir, read_only=True) as checkpoints:

        def load(at: int) -> LoadedModel:
            config, _ = checkpoints.read_run(at)
            return LoadedModel(checkpoints.restore_model(at, config.model), config)

        return load_latest_valid(checkpoints, load, step=step)


def load_trained(run_dir: str | Path, step: int | None = None) -> TrainedModel:
    """Like `load_model`, with the tokenizer of the run, which must not have changed since.

    Raises:
      CheckpointError: no checkpoint can be read.
      MismatchError: the tokenizer's file means something else now.
      DataError: the tokenizer's file cannot be read.
    """
    with RunCheckpoints(run_dir, read_only=True) as checkpoints:

        def load(at: int) -> TrainedModel:
            config, fingerprint = checkpoints.read_run(at)
            tokenizer = load_tokenizer(config.data.tokenizer)
            if tokenizer.fingerprint() != fingerprint:
                raise MismatchError(
                    f"{run_dir} was trained with tokenizer {fingerprint}, but "
                    f"{config.data.tokenizer!r} is now {tokenizer.fingerprint()}; restore that file"
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
    """What `load` gives for the newest checkpoint that is not damaged, or for `step` alone.

    Every damaged one is named on the error stream, then handed to `on_damaged`.

    Raises:
      CheckpointError: no checkpoint can be read.
      MismatchError: the newest readable one is of another model or other data.
    """
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{checkpoints.directory} holds no complete checkpoint to go on from")
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
            print(f"damaged checkpoint, trying an earlier one: {error}", file=sys.stderr)
            if on_damaged is not None:
                on_damaged(at, error)
    raise CheckpointError(f"no checkpoint in {checkpoints.directory} can be read")
