"""Weights in `.safetensors` files by released name, with the configuration in their metadata."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megalodon_jax.config import AnyModelConfig, ModelConfig, TrainConfig, config_from_dict
from megalodon_jax.errors import ConfigError, ConvertError
from megalodon_jax.file_limits import FileLimitError, check_regular
from megalodon_jax.interop.released import from_state_dict, to_state_dict
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.model import Megalodon

CONFIG_KEY = "megalodon_config"
# "no": the file's configuration names no tokenizer of the model.
TOKENIZER_KEY = "megalodon_has_tokenizer"


class Arrays(NamedTuple):
    """The contents of a `.safetensors` file."""

    by_name: dict[str, np.ndarray]
    metadata: dict[str, str]


def write_safetensors(
    model: LanguageModel, path: Path, config: TrainConfig, *, has_tokenizer: bool = True
) -> None:
    """Writes a model with its released names, and the configuration in the metadata.

    Args:
      model: a MEGALODON without ablations.
      path: a new local file; its folder is created.
      config: the training configuration.
      has_tokenizer: whether `config.data.tokenizer` is the model's.

    Raises:
      ConvertError: the model has no released names.
    """
    require_megalodon(model.config)
    assert isinstance(model, Megalodon)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = to_state_dict(model)
    metadata = config_metadata(config, has_tokenizer=has_tokenizer)
    save_file(arrays, str(path), metadata={**metadata, "format": "np"})


def config_metadata(config: TrainConfig, *, has_tokenizer: bool) -> dict[str, str]:
    """The entries that hold a training configuration in a file's metadata."""
    metadata = {CONFIG_KEY: json.dumps(dataclasses.asdict(config))}
    return metadata if has_tokenizer else {**metadata, TOKENIZER_KEY: "no"}


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
    arrays = read_arrays(path)
    if config is not None:
        run = TrainConfig(model=config)
    else:
        found = config_of_metadata(path, arrays.metadata)
        if found is None:
            raise ConvertError(
                f"{path} has no model configuration; give --config to megalodon convert"
            )
        run = found
    return from_state_dict(require_megalodon(run.model), arrays.by_name), run


def read_arrays(path: str | Path) -> Arrays:
    """All arrays and the metadata of a file.

    Raises:
      ConvertError: the file cannot be read.
    """
    try:
        check_regular(path)
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            return Arrays({name: _tensor(file, name) for name in file.keys()}, metadata)  # noqa: SIM118
    except (OSError, SafetensorError, FileLimitError) as error:
        raise ConvertError(f"cannot read {path} as safetensors: {error}") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a file, without its arrays.

    Raises:
      ConvertError: the file cannot be read.
    """
    try:
        check_regular(path)
        with safe_open(str(path), framework="np") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError, FileLimitError) as error:
        raise ConvertError(f"cannot read {path} as safetensors: {error}") from error


def _tensor(file: Any, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    # The library raises several types for dtypes that NumPy has not.
    except (SafetensorError, TypeError, AttributeError, KeyError, ValueError) as error:
        dtype = file.get_slice(name).get_dtype()
        raise ConvertError(
            f"cannot read entry {name!r:.80} of dtype {dtype} as an array: {error}"
        ) from error


def config_of_metadata(path: str | Path, metadata: Mapping[str, str]) -> TrainConfig | None:
    """The training configuration in a file's metadata; None: there is none.

    Raises:
      ConvertError: it is not one.
    """
    if CONFIG_KEY not in metadata:
        return None
    where = f"{path}: the configuration in the metadata"
    try:
        table = json.loads(metadata[CONFIG_KEY])
    # ValueError: also of numbers with thousands of digits; RecursionError: of nested brackets.
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{where} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ConvertError(f"{where} is a {type(table).__name__}; it must be a table")
    try:
        return config_from_dict(table)
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}") from error


def require_megalodon(config: AnyModelConfig) -> ModelConfig:
    """The configuration, if it is a MEGALODON's; the released format has no other models.

    Raises:
      ConvertError: it is that of another kind.
    """
    if not isinstance(config, ModelConfig):
        raise ConvertError(
            f"model.kind is {config.kind!r}, but the released format holds only MEGALODON; use the "
            "run directory itself"
        )
    return config
