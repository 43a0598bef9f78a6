"""Parsing of TOML files and nested tables into a `TrainConfig`."""

import dataclasses
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

from megalodon_jax.config.checks import (
    add_fault,
    check_keys,
    collect_faults,
    none_from_text,
    number_or_none,
    shown,
    table_of_list,
)
from megalodon_jax.config.kinds import AnyModelConfig, model_config_class
from megalodon_jax.config.ranges import plain_type
from megalodon_jax.config.run import TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.file_limits import FileLimitError, read_bytes
from megalodon_jax.presets import PresetKind, read_preset

MAX_CONFIG_BYTES = 1_000_000


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
        text = read_bytes(path, max_bytes=MAX_CONFIG_BYTES).decode("utf-8")
        table = tomllib.loads(text)
    except FileLimitError as error:
        raise ConfigError(f"cannot read config {path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    # ValueError: also of numbers with thousands of digits; RecursionError: of nested brackets.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    try:
        return config_from_dict(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_from_dict(table: Mapping[str, Any]) -> TrainConfig:
    """Builds a `TrainConfig` from nested mappings; the inverse of `dataclasses.asdict`.

    Raises:
      ConfigError: a key is unknown, or a value has the wrong type or is out of range; the message
        has the faults of all tables.
    """
    with collect_faults() as faults:
        known = _known_entries(TrainConfig, _with_presets(dict(table)), "")
        config = _structure(known)
    assert config is not None, faults
    return config


def _with_presets(table: dict[str, Any]) -> dict[str, Any]:
    presets: dict[str, PresetKind] = {"model": "models", "mesh": "meshes"}
    for name, kind in presets.items():
        fields = table.get(name)
        if not isinstance(fields, Mapping) or not fields.get("preset"):
            continue
        fields = dict(fields)
        preset = fields.pop("preset")
        if not isinstance(preset, str):
            add_fault(f"{name}.preset is {shown(preset)}; use the name of a shipped file")
            preset_fields = {}
        else:
            preset_fields = _preset(kind, preset)
        table[name] = {**preset_fields, **fields}
    return table


def _preset(kind: PresetKind, name: str) -> dict[str, Any]:
    try:
        return read_preset(kind, name)
    except ConfigError as error:
        add_fault(str(error))
        return {}


def _structure(table: Mapping[str, Any]) -> TrainConfig | None:
    import cattrs

    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    # The dataclasses check types, choices and ranges themselves, for Python as well.
    for scalar in (int, str, bool):
        converter.register_structure_hook(scalar, lambda value, _: value)
    converter.register_structure_hook(float, _float_of_integer)
    converter.register_structure_hook_func(
        lambda kind: (
            get_origin(plain_type(kind)) in (Literal, tuple) and table_of_list(kind) is None
        ),
        _list_as_tuple,
    )
    converter.register_structure_hook_func(
        lambda kind: number_or_none(kind) is not None,
        lambda value, kind: _float_of_integer(value) if number_or_none(kind) is float else value,
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
        add_fault("; ".join(messages))
        return None


def _float_of_integer(value: Any, _kind: Any = float) -> Any:
    """A whole number as a float, where a float can hold it; other values unchanged."""
    is_small = type(value) is int and abs(value) <= sys.float_info.max
    return float(value) if is_small else value


def _list_as_tuple(value: Any, _kind: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _known_entries(cls: type, table: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The table without unknown keys, whose faults are added, and with the texts "none" read."""
    copy = none_from_text(cls, check_keys(cls, table, path or "config"), path or "config")
    for entry in dataclasses.fields(cls):
        if (entry_class := table_of_list(entry.type)) and entry.name in copy:
            name = f"{path}.{entry.name}" if path else entry.name
            copy[entry.name] = _known_tables(entry_class, copy[entry.name], name)
            continue
        is_table = dataclasses.is_dataclass(entry.type) or entry.type == AnyModelConfig
        if entry.name not in copy or not is_table:
            continue
        value = copy.pop(entry.name)
        if not isinstance(value, Mapping):
            add_fault(f"{entry.name} must be a table, got {shown(value)}")
            continue
        kind: Any = entry.type
        if kind == AnyModelConfig:
            try:
                kind = model_config_class(value)
            except ConfigError as error:
                add_fault(str(error))
                continue
        copy[entry.name] = _known_entries(kind, value, entry.name)
    return copy


def _known_tables(cls: type, tables: Any, path: str) -> list[dict[str, Any]]:
    """`_known_entries` of every table of a list."""
    if not isinstance(tables, list | tuple) or not all(isinstance(t, Mapping) for t in tables):
        add_fault(f"{path} is {shown(tables)}; use a list of tables, [[{path}]]")
        return []
    return [_known_entries(cls, table, f"{path}[{i}]") for i, table in enumerate(tables)]
