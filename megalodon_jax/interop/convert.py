"""Conversion of weights between released checkpoints, safetensors files and run directories."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megalodon_jax.checkpoints import load_model, save_model
from megalodon_jax.checkpoints.directory import open_directory
from megalodon_jax.config import (
    AnyModelConfig,
    ModelConfig,
    TrainConfig,
    config_from_dict,
    load_config,
    model_preset,
)
from megalodon_jax.errors import ConfigError, ConvertError
from megalodon_jax.file_limits import FileLimitError, check_regular
from megalodon_jax.interop.released import (
    from_state_dict,
    read_released_checkpoint,
    to_state_dict,
)
from megalodon_jax.interop.torch_file import read_torch_file
from megalodon_jax.model import Megalodon
from megalodon_jax.presets import preset_names
from megalodon_jax.storage.files import exists
from megalodon_jax.storage.location import AnyPath, as_path, is_store

CONFIG_KEY = "megalodon_config"


def convert(
    source: str | AnyPath,
    target: str | AnyPath,
    config: str | None = None,
    *,
    allow_unverified: bool = False,
) -> str:
    """Converts a model's weights; never overwrites a file or directory.

    Args:
      source: a released checkpoint directory (config.json and consolidated*.pth, model-parallel
        shards included), one released .pth file, a .safetensors file with released names, or a
        run_dir of this project, also a URL of an object store.
      target: a new .safetensors file (released names, configuration in the metadata), or a new
        run_dir for `generate`, `evaluate` and `train`, also a URL.
      config: a TOML file or the name of a preset, for a source without a configuration.
      allow_unverified: also read a run's checkpoint without manifest, with a warning.

    Returns:
      A line that describes what was written.

    Raises:
      ConvertError: the source is of another kind or has no configuration, or the target exists.
      StateDictError: the weights do not match the configuration; the entries are named.
    """
    source, target = as_path(source), as_path(target)
    if exists(target):
        raise ConvertError(f"{target} exists and is not overwritten; give another target")
    run = TrainConfig() if config is None else _read_config(config)
    model, run = _read(
        source, run, has_config=config is not None, allow_unverified=allow_unverified
    )
    if target.suffix == ".safetensors":
        _require_local(target)
        target = Path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        metadata = {CONFIG_KEY: json.dumps(dataclasses.asdict(run)), "format": "np"}
        save_file(to_state_dict(model), str(target), metadata=metadata)
        contents = f"released names, {target.stat().st_size / 1e6:,.1f} MB"
    elif target.suffix:
        raise ConvertError(
            f"cannot write {target}; give a name that ends in .safetensors, or a run directory"
        )
    else:
        save_model(model, target, dataclasses.replace(run, run_dir=str(target)))
        contents = "a run directory for generate, evaluate and init_from"
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return f"wrote {target}: {count:,} parameters from {source} ({contents})"


def read_safetensors(
    path: str | Path, config: ModelConfig | None = None
) -> tuple[Megalodon, TrainConfig]:
    """Reads a model and its configuration from a .safetensors file with released names.

    Args:
      path: the file.
      config: the model's configuration; None: that of the file's metadata, where `convert` writes
        it.

    Raises:
      ConvertError: the file cannot be read, or has no configuration.
    """
    try:
        check_regular(path)
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            state_dict = {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, FileLimitError) as error:
        raise ConvertError(f"cannot read {path} as safetensors: {error}") from error
    if config is not None:
        run = TrainConfig(model=config)
    elif CONFIG_KEY in metadata:
        run = _config_of_metadata(path, metadata[CONFIG_KEY])
    else:
        raise ConvertError(f"{path} has no model configuration; give --config")
    return from_state_dict(_megalodon(run.model), state_dict), run


def _tensor(file: Any, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    # The library raises several types for dtypes that NumPy has not.
    except (SafetensorError, TypeError, AttributeError, KeyError, ValueError) as error:
        dtype = file.get_slice(name).get_dtype()
        raise ConvertError(
            f"cannot read entry {name!r:.80} of dtype {dtype} as an array: {error}"
        ) from error


def _config_of_metadata(path: str | Path, text: str) -> TrainConfig:
    where = f"{path}: the configuration in the metadata"
    try:
        table = json.loads(text)
    # ValueError: also of numbers with thousands of digits; RecursionError: of nested brackets.
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{where} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ConvertError(f"{where} is a {type(table).__name__}; it must be a table")
    try:
        return config_from_dict(table)
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}") from error


def _megalodon(config: AnyModelConfig) -> ModelConfig:
    """The configuration, if it is a MEGALODON's; the released format has no other models."""
    if not isinstance(config, ModelConfig):
        raise ConvertError(
            f"model.kind is {config.kind!r}, but the released format holds only MEGALODON; use the "
            "run directory itself"
        )
    return config


def _require_local(path: AnyPath) -> None:
    if is_store(path):
        raise ConvertError(
            f"{path} is in an object store, where only run directories are read and written; use a "
            "local path"
        )


def _read(
    source: AnyPath, run: TrainConfig, *, has_config: bool, allow_unverified: bool
) -> tuple[Megalodon, TrainConfig]:
    if open_directory(source).child("checkpoints").exists():
        model, saved = load_model(source, allow_unverified=allow_unverified)
        _megalodon(saved.model)
        assert isinstance(model, Megalodon)
        return model, saved
    _require_local(source)
    source = Path(source)
    if source.suffix == ".safetensors":
        return read_safetensors(source, _megalodon(run.model) if has_config else None)
    if source.suffix in (".pth", ".pt"):
        if not has_config:
            raise ConvertError(f"{source} has no model configuration; give --config")
        return from_state_dict(_megalodon(run.model), read_torch_file(source)), run
    if source.is_dir():
        shape, state_dict = read_released_checkpoint(source)
        return from_state_dict(shape, state_dict), dataclasses.replace(run, model=shape)
    if not source.exists():
        raise ConvertError(f"{source} does not exist; give an existing source")
    raise ConvertError(
        f"cannot convert {source}; give a released checkpoint directory, a .pth or .safetensors "
        "file, or a run_dir"
    )


def _read_config(name: str) -> TrainConfig:
    if name in preset_names():
        return TrainConfig(model=model_preset(name))
    return load_config(name)
