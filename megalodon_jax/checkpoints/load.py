"""Loading of models and parameters from run directories, and saving of models."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.checkpoints.base_model import LoadBase
from megalodon_jax.checkpoints.manager import RunCheckpoints
from megalodon_jax.checkpoints.reading import RestoredRun
from megalodon_jax.config import TrainConfig
from megalodon_jax.data.tokenizer import Tokenizer, load_tokenizer
from megalodon_jax.errors import (
    CheckpointError,
    IncompleteCheckpointError,
    MismatchError,
    StoreUnreachableError,
)
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.lora import merge_lora
from megalodon_jax.parallel.distributed import all_gather_json, is_main
from megalodon_jax.storage.location import AnyPath


class LoadedModel(NamedTuple):
    """A trained model and its training configuration, with the run's own tokenizer file."""

    model: LanguageModel
    config: TrainConfig


class LoadedWeights(NamedTuple):
    """A checkpoint of a run: model, training configuration, and its step."""

    model: LanguageModel
    config: TrainConfig
    step: int


class LoadedRun(NamedTuple):
    """A checkpoint of a run: model, training configuration, tokenizer, and its step."""

    model: LanguageModel
    config: TrainConfig
    tokenizer: Tokenizer
    step: int


class TrainedModel(NamedTuple):
    """A trained model and the tokenizer it was trained with."""

    model: LanguageModel
    tokenizer: Tokenizer


def save_model(
    model: LanguageModel,
    run_dir: str | AnyPath,
    config: TrainConfig,
    *,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Saves a model as a run directory for generation, evaluation and `init_from`.

    Args:
      model: the model.
      run_dir: the new run's directory.
      config: the training configuration.
      tokenizer: the model's; None: that of `config`.

    Raises:
      CheckpointError: `run_dir` already has checkpoints, or the save failed.
      DataError: the tokenizer of `config` cannot be read.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(config.data.tokenizer)
    with RunCheckpoints(run_dir) as checkpoints:
        if steps := checkpoints.steps():
            raise CheckpointError(
                f"{run_dir} already has checkpoints (newest: step {steps[-1]}); give another "
                "directory"
            )
        checkpoints.keep_tokenizer(tokenizer)
        checkpoints.save_params(
            nnx.state(model, nnx.Param),
            config=config,
            tokenizer_fingerprint=tokenizer.fingerprint(),
        )
        checkpoints.wait()


def load_model(
    run_dir: str | AnyPath, step: int | None = None, *, allow_unverified: bool = False
) -> LoadedModel:
    """The model of a training run.

    Args:
      run_dir: the run's directory.
      step: step of the checkpoint; None: the newest readable one.
      allow_unverified: also load a checkpoint without manifest, with a warning.

    Raises:
      CheckpointError: the run has no readable checkpoint.
      MismatchError: the run has LoRA factors without their base; `megalodon_jax.load` reads both.
    """
    loaded = load_weights(run_dir, step, allow_unverified=allow_unverified)
    return LoadedModel(loaded.model, loaded.config)


def load_weights(
    run_dir: str | AnyPath,
    step: int | None = None,
    *,
    allow_unverified: bool = False,
    mesh: Mesh | None = None,
    load_base: LoadBase | None = None,
    merges_lora: bool = True,
) -> LoadedWeights:
    """A checkpoint of a run without its tokenizer; arguments and errors as for `load_run`."""
    with RunCheckpoints(run_dir, read_only=True, allow_unverified=allow_unverified) as checkpoints:

        def load(at: int) -> LoadedWeights:
            config, _ = checkpoints.config_with_own_tokenizer(at)
            model = checkpoints.restore_model(at, config.model, mesh, load_base=load_base)
            return LoadedWeights(merge_lora(model) if merges_lora else model, config, at)

        return load_latest_valid(checkpoints, load, step=step)


def load_run(
    run_dir: str | AnyPath,
    step: int | None = None,
    *,
    allow_unverified: bool = False,
    tokenizer: str = "",
    mesh: Mesh | None = None,
    load_base: LoadBase | None = None,
    merges_lora: bool = True,
) -> LoadedRun:
    """A checkpoint of a run with its tokenizer.

    Args:
      run_dir: the run's directory or URL.
      step: step of the checkpoint; None: the newest readable one.
      allow_unverified: also load a checkpoint without manifest, with a warning.
      tokenizer: file to use instead of the run's own copy; another tokenizer than that of training
        gives a warning.
      mesh: devices over which the parameters are sharded; None: this process's first device.
      load_base: reads the base of a run with LoRA, such as `interop.sources.load_base`.
      merges_lora: merge LoRA factors into their kernels.

    Raises:
      CheckpointError: the run has no readable checkpoint.
      MismatchError: the tokenizer file has changed since training, or `tokenizer` has ids that the
        model lacks; or the run has LoRA factors and `load_base` is None or finds another base.
      DataError: the tokenizer file cannot be read.
    """
    with RunCheckpoints(run_dir, read_only=True, allow_unverified=allow_unverified) as checkpoints:

        def load(at: int) -> LoadedRun:
            config, fingerprint = checkpoints.config_with_own_tokenizer(at)
            loaded = load_tokenizer(tokenizer or config.data.tokenizer)
            if loaded.fingerprint() != fingerprint:
                _report_other_tokenizer(run_dir, config, fingerprint, loaded, override=tokenizer)
            model = checkpoints.restore_model(at, config.model, mesh, load_base=load_base)
            return LoadedRun(merge_lora(model) if merges_lora else model, config, loaded, at)

        return load_latest_valid(checkpoints, load, step=step)


def load_trained(
    run_dir: str | AnyPath,
    step: int | None = None,
    *,
    allow_unverified: bool = False,
    tokenizer: str = "",
    load_base: LoadBase | None = None,
) -> TrainedModel:
    """The model of a training run and its tokenizer; arguments and errors as for `load_run`."""
    run = load_run(
        run_dir,
        step,
        allow_unverified=allow_unverified,
        tokenizer=tokenizer,
        load_base=load_base,
    )
    return TrainedModel(run.model, run.tokenizer)


def _report_other_tokenizer(
    run_dir: str | AnyPath, config: TrainConfig, trained: str, found: Tokenizer, *, override: str
) -> None:
    if not override:
        raise MismatchError(
            f"{run_dir} was trained with tokenizer {trained}, but {config.data.tokenizer!r} is now "
            f"{found.fingerprint()}; restore the original file, or name one with --tokenizer"
        )
    if found.vocab_size > config.model.vocab_size:
        raise MismatchError(
            f"tokenizer {override!r} has {found.vocab_size:,} ids, the model in {run_dir} "
            f"{config.model.vocab_size:,}; give the tokenizer of training"
        )
    print(
        f"warning: tokenizer {override!r} is {found.fingerprint()}, but {run_dir} was trained with "
        f"{trained}",
        file=sys.stderr,
    )


def load_latest_valid[T](
    checkpoints: RunCheckpoints,
    load: Callable[[int], T],
    *,
    step: int | None = None,
    on_damaged: Callable[[int, CheckpointError], None] | None = None,
) -> T:
    """Applies `load` to the newest complete checkpoint without damage, or to that of `step`.

    Damaged and incomplete checkpoints are reported on stderr and passed to `on_damaged`.

    Raises:
      CheckpointError: no checkpoint can be read.
      StoreUnreachableError: the store gives no answer, which says nothing about the checkpoints.
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
        except (MismatchError, StoreUnreachableError):
            raise
        except CheckpointError as error:
            kind = "incomplete" if isinstance(error, IncompleteCheckpointError) else "damaged"
            print(f"{kind} checkpoint, trying the previous one: {error}", file=sys.stderr)
            if on_damaged is not None:
                on_damaged(at, error)
    raise CheckpointError(
        f"no checkpoint in {checkpoints.directory} can be read; the errors above give the reasons"
    )


def resolve_auto_resume(checkpoints: RunCheckpoints, config: TrainConfig) -> TrainConfig:
    """The configuration with `resume` set if `auto_resume` is and there is a complete checkpoint.

    Without one, checkpoints whose save was interrupted are renamed to `incomplete_<step>`, so that
    the run can begin with its first step. A run whose checkpoints are damaged does not begin anew.
    """
    if not config.auto_resume:
        return config
    # The list of process 0: a shared file system may show others an older one.
    steps, complete = all_gather_json([checkpoints.steps(), checkpoints.complete_steps()])[0]
    if complete or (steps and config.allow_unverified):
        return dataclasses.replace(config, resume=True)
    for step in steps:
        renamed = checkpoints.set_aside(step, prefix="incomplete")
        if is_main():
            print(f"the save of step {step} was interrupted; it is now {renamed}", file=sys.stderr)
    if is_main():
        print(f"no complete checkpoint in {config.run_dir}: beginning with the first step")
    return config


def restore_for_resume(
    checkpoints: RunCheckpoints,
    config: TrainConfig,
    mesh: Mesh,
    *,
    load_data: Callable[[dict[str, Any]], None],
    optimizer: optax.GradientTransformation | None = None,
) -> RestoredRun:
    """Restores the state from which a run resumes; what it passes over is renamed, not deleted.

    Damaged checkpoints become `damaged_<step>`, incomplete ones `incomplete_<step>`, and those
    after `config.resume_step` `later_<step>`. Nothing is renamed if the run cannot resume.

    Args:
      checkpoints: those of `config.run_dir`.
      config: the resumed run.
      mesh: its devices.
      load_data: restores the data loader; it may refuse its state.
      optimizer: the run's own optimizer; None: that of `config.optim`.

    Raises:
      CheckpointError: the run has no readable checkpoint, or that of `resume_step` is damaged.
      MismatchError: the checkpoint is of another model.
    """
    passed: dict[int, CheckpointError] = {}
    restored = load_latest_valid(
        checkpoints,
        lambda step: checkpoints.restore(step, config, mesh, optimizer=optimizer),
        step=config.resume_step,
        on_damaged=passed.__setitem__,
    )
    load_data(restored.loader_state)
    for step, error in passed.items():
        is_incomplete = isinstance(error, IncompleteCheckpointError)
        checkpoints.set_aside(step, prefix="incomplete" if is_incomplete else "damaged")
    renamed = []
    if config.resume_step is not None:
        renamed = checkpoints.set_aside_after(config.resume_step)
    if is_main():
        if renamed:
            names = ", ".join(path.name for path in renamed)
            print(f"later checkpoints are kept as {names} in {checkpoints.directory}")
        if checkpoints.verification is not None:
            print(f"checkpoint of step {int(restored.state.step)} verified: ", end="")
            print(checkpoints.verification, flush=True)
    return restored
