"""Reading of a trained model from any form: the one way that `convert` and `load` share."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from megalodon_jax.checkpoints import LoadBase, LoadedRun, LoadedWeights, load_run, load_weights
from megalodon_jax.checkpoints.directory import open_directory
from megalodon_jax.config import LoraConfig, TrainConfig
from megalodon_jax.data.tokenizer import Tokenizer, load_tokenizer
from megalodon_jax.errors import ConfigError, ConvertError
from megalodon_jax.interop.huggingface.folder import is_huggingface_folder, read_huggingface
from megalodon_jax.interop.released import from_state_dict, read_released_checkpoint
from megalodon_jax.interop.safetensors_files import (
    TOKENIZER_KEY,
    read_metadata,
    read_safetensors,
    require_megalodon,
)
from megalodon_jax.interop.torch_file import read_torch_file
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.storage.location import AnyPath, as_path, is_store

_CHECKPOINTS = "checkpoints"


class Source(NamedTuple):
    """A trained model that was read.

    Attributes:
      model: the model; its arrays are on the host unless it comes from a run.
      config: the training configuration.
      tokenizer_name: the tokenizer as `load_tokenizer` names it; None: the source has none.
      tokenizer: the tokenizer, where it was asked for.
      run: the run and the step of the checkpoint; None: another form.
      lora: the factors of a run with LoRA, which `model` has merged unless they were asked for.
    """

    model: LanguageModel
    config: TrainConfig
    tokenizer_name: str | None
    tokenizer: Tokenizer | None = None
    run: "RunCheckpoint | None" = None
    lora: LoraConfig | None = None


class RunCheckpoint(NamedTuple):
    """A checkpoint of a run; step None: the newest readable one."""

    directory: AnyPath
    step: int | None

    @property
    def path(self) -> AnyPath:
        """The checkpoint, or the run directory."""
        if self.step is None:
            return self.directory
        return self.directory / _CHECKPOINTS / str(self.step)


def is_run(source: AnyPath) -> bool:
    """Whether a path is a run directory or one of a run's checkpoints."""
    return _as_run(source) is not None


def _as_run(source: AnyPath) -> RunCheckpoint | None:
    """The run and step that a path names; None: it names none."""
    if open_directory(source).child(_CHECKPOINTS).exists():
        return RunCheckpoint(source, None)
    if source.name.isdecimal() and source.parent.name == _CHECKPOINTS:
        return RunCheckpoint(source.parent.parent, int(source.name))
    return None


def read_source(
    source: str | AnyPath,
    config: TrainConfig | None = None,
    *,
    tokenizer: str = "",
    reads_tokenizer: bool,
    step: int | None = None,
    allow_unverified: bool = False,
    mesh: Mesh | None = None,
    load_base: LoadBase | None = None,
    merges_lora: bool = True,
) -> Source:
    """Reads a model.

    Args:
      source: a run_dir or one of its checkpoints (`run/checkpoints/STEP`), also a URL; a
        .safetensors file; a folder in the Hugging Face form; a released checkpoint directory or
        .pth file.
      config: for a source without a configuration.
      tokenizer: file to use instead of the source's own tokenizer; empty: its own.
      reads_tokenizer: whether to read the tokenizer too.
      step: step of a run's checkpoint; None: the newest readable one, or the one that `source`
        names.
      allow_unverified: also read a run's checkpoint without manifest, with a warning.
      mesh: devices over which a run's parameters are sharded while they are read.
      load_base: reads the base of a run with LoRA; None: such runs are refused.
      merges_lora: merge LoRA factors into their kernels.

    Raises:
      ConvertError: there is no such source, it is damaged, or it has no configuration.
      CheckpointError: the run has no readable checkpoint.
      DataError: the tokenizer cannot be read.
      ConfigError: `step` is given for another source than a run directory.
    """
    source = as_path(source)
    run = _as_run(source)
    if step is not None:
        if run is None or run.step is not None:
            raise ConfigError(
                f"step {step} names a checkpoint of a run directory; {source} is none"
            )
        run = run._replace(step=step)
    if run is not None:
        options: dict[str, Any] = {
            "allow_unverified": allow_unverified,
            "mesh": mesh,
            "load_base": load_base,
            "merges_lora": merges_lora,
        }
        if reads_tokenizer:
            loaded = load_run(run.directory, run.step, tokenizer=tokenizer, **options)
            return _source_of_run(run, loaded, tokenizer, loaded.tokenizer)
        return _source_of_run(run, load_weights(run.directory, run.step, **options), "", None)
    require_local(source)
    read = _read_files(Path(source), config)
    if tokenizer:
        data = dataclasses.replace(read.config.data, tokenizer=tokenizer)
        named = dataclasses.replace(read.config, data=data)
        read = read._replace(config=named, tokenizer_name=tokenizer)
    if not reads_tokenizer or read.tokenizer_name is None:
        return read
    return read._replace(tokenizer=load_tokenizer(read.tokenizer_name))


def _source_of_run(
    run: RunCheckpoint, loaded: LoadedRun | LoadedWeights, name: str, tokenizer: Tokenizer | None
) -> Source:
    config = loaded.config
    return Source(
        loaded.model,
        # The configuration of the merged model.
        dataclasses.replace(config, lora=LoraConfig()),
        name or config.data.tokenizer,
        tokenizer,
        RunCheckpoint(run.directory, loaded.step),
        config.lora if config.lora.rank else None,
    )


def require_local(path: AnyPath) -> None:
    """Checks that a path is not a URL.

    Raises:
      ConvertError: it is one.
    """
    if is_store(path):
        raise ConvertError(
            f"{path} is in an object store, where only run directories are read and written; use a "
            "local path"
        )


def _read_files(source: Path, config: TrainConfig | None) -> Source:
    if source.suffix == ".safetensors":
        shape = None if config is None else require_megalodon(config.model)
        model, saved = read_safetensors(source, shape)
        if shape is not None or TOKENIZER_KEY in read_metadata(source):
            return Source(model, saved, None)
        return Source(model, saved, saved.data.tokenizer)
    if source.suffix in (".pth", ".pt"):
        if config is None:
            raise ConvertError(
                f"{source} has no model configuration; give --config to megalodon convert"
            )
        shape = require_megalodon(config.model)
        return Source(from_state_dict(shape, read_torch_file(source)), config, None)
    if source.is_dir():
        return _read_folder(source, config)
    if not source.exists():
        raise ConvertError(f"{source} does not exist; give a run directory or a saved model")
    raise ConvertError(
        f"cannot read {source} as a model; give a run_dir, one of its checkpoints, a .safetensors "
        "or .pth file, a folder in the Hugging Face form, or a released checkpoint directory"
    )


def _read_folder(source: Path, config: TrainConfig | None) -> Source:
    if is_huggingface_folder(source):
        return Source(*read_huggingface(source))
    if not list(source.glob("consolidated*.pth")):
        names = sorted(path.name for path in source.iterdir())
        shown = json.dumps(names[:5])[1:-1] + (", ..." if len(names) > 5 else "")
        raise ConvertError(
            f"{source} holds {shown or 'nothing'}: it is no run_dir (no folder checkpoints), not a "
            "folder in the Hugging Face form (no config.json of model type megalodon) and not a "
            "consolidated released checkpoint (no consolidated*.pth)"
        )
    shape, state_dict = read_released_checkpoint(source)
    run = dataclasses.replace(TrainConfig() if config is None else config, model=shape)
    return Source(from_state_dict(shape, state_dict), run, None)
