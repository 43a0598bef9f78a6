"""Parsing of TOML files and nested tables into a `TrainConfig`."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

from megalodon_jax.config.checks import check_keys, none_from_text, require
from megalodon_jax.config.kinds import AnyModelConfig, model_config_class
from megalodon_jax.config.run import TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.presets import PresetKind, read_preset


def load_config(path: str | Path) -> TrainConfig:
    """Reads a `TrainConfig` from a TOML file.

    A number that may be None, such as `model.rope_base`, is None if its value is the text "none".
    `[model]` and `[mesh]` may have a key `preset`, the name of a shipped size or mesh; the other
    keys of the table override its values.

    Raises:
      ConfigError: the file is missing or malformed, a key is unknown (the closest field is
        suggested), or a value has the wrong type or is out of range.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    try:
        return config_from_dict(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_from_dict(table: Mapping[str, Any]) -> TrainConfig:
    """Builds a `TrainConfig` from nested mappings; the inverse of `dataclasses.asdict`."""
    import cattrs

    table = dict(table)
    presets: dict[str, PresetKind] = {"model": "models", "mesh": "meshes"}
    for name, kind in presets.items():
        fields = table.get(name, {})
        require(isinstance(fields, Mapping), f"{name} must be a table, got {fields!r}")
        fields = dict(fields)
        if preset := fields.pop("preset", None):
            table[name] = {**read_preset(kind, preset), **fields}
    table = _check_nested_keys(TrainConfig, table, "")
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for scalar in (int, float, str, bool):
        converter.register_structure_hook(scalar, _strict_scalar)
    # The dataclasses check their choices themselves, with better messages.
    converter.register_structure_hook_func(
        lambda kind: get_origin(kind) is Literal, lambda value, _: value
    )
    converter.register_structure_hook_func(
        lambda kind: kind == AnyModelConfig,
        lambda value, _: converter.structure(value, model_config_class(value)),
    )
    try:
        return converter.structure(table, TrainConfig)
    except cattrs.BaseValidationError as error:
        messages = cattrs.transform_error(
            error, path="config", format_exception=lambda cause, _: str(cause)
        )
        raise ConfigError("; ".join(messages)) from error


def _strict_scalar(value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _check_nested_keys(cls: type, table: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A copy of the table, with the texts "none" read; raises `ConfigError` for an unknown key."""
    check_keys(cls, table, path or "config")
    copy = none_from_text(cls, table, path or "config")
    for entry in dataclasses.fields(cls):
        is_table = dataclasses.is_dataclass(entry.type) or entry.type == AnyModelConfig
        if entry.name in table and is_table:
            value = table[entry.name]
            require(isinstance(value, Mapping), f"{entry.name} must be a table, got {value!r}")
            kind: Any = entry.type
            if kind == AnyModelConfig:
                kind = model_config_class(value)
            copy[entry.name] = _check_nested_keys(kind, value, entry.name)
    return copy
