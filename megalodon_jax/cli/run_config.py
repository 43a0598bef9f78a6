"""A run's configuration on the command line: a TOML file, presets, then single settings."""

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, Literal, cast

import tyro

from megalodon_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ProcessesConfig,
    TrainConfig,
    load_config,
)
from megalodon_jax.errors import ConfigError
from megalodon_jax.presets import PresetKind, config_names, find_config, preset_names


def _with_preset(config: type, kind: PresetKind) -> Any:
    """A configuration with one more setting, the name of a preset."""
    names = Literal[tuple(preset_names(kind))]  # type: ignore[valid-type]
    return dataclasses.make_dataclass(
        config.__name__,
        [("preset", names | None, field(default=None))],
        bases=(config,),
        frozen=True,
        kw_only=True,
    )


ModelSettings = _with_preset(ModelConfig, "models")
MeshSettings = _with_preset(MeshConfig, "meshes")
_PRESETS: dict[str, tuple[type[ModelConfig] | type[MeshConfig], Any]] = {
    "model": (ModelConfig, ModelSettings),
    "mesh": (MeshConfig, MeshSettings),
}
# Booleans of tables take True or False; those of the run itself, such as --resume, are flags.
_ExplicitBooleans = tyro.conf.FlagConversionOff
RunSettings = dataclasses.make_dataclass(
    "RunSettings",
    [
        (
            "model",
            Annotated[ModelSettings, _ExplicitBooleans],
            field(default_factory=ModelSettings),
        ),
        ("data", Annotated[DataConfig, _ExplicitBooleans], field(default_factory=DataConfig)),
        ("optim", Annotated[OptimConfig, _ExplicitBooleans], field(default_factory=OptimConfig)),
        ("mesh", MeshSettings, field(default_factory=MeshSettings)),
        (
            "processes",
            Annotated[ProcessesConfig, _ExplicitBooleans],
            field(default_factory=ProcessesConfig),
        ),
    ],
    bases=(TrainConfig,),
    frozen=True,
    kw_only=True,
)


def default_settings(arguments: Sequence[str]) -> Any:
    """The settings that single options change: those of the config file, with presets applied.

    Args:
      arguments: the command's arguments, CONFIG first.

    Raises:
      ConfigError: there is no such file, shipped configuration or preset.
    """
    name = next(iter(arguments), "--help")
    config = TrainConfig() if name.startswith("-") else load_config(find_config(name))
    values = _fields(config)
    for table, (plain, settings) in _PRESETS.items():
        preset = _last_value(arguments, f"--{table}.preset")
        base = values[table] if preset is None else plain.from_preset(preset)
        values[table] = settings(**_fields(base), preset=preset)
    return RunSettings(**values)


def check_named(name: str) -> None:
    """Raises `ConfigError` if CONFIG is missing, so that an option stands in its place."""
    if name.startswith("-"):
        raise ConfigError(
            f"the configuration comes first: name a TOML file or one of {', '.join(config_names())}"
        )


def to_config(settings: Any) -> TrainConfig:
    """The plain configuration of parsed settings."""
    values = _fields(cast(TrainConfig, settings))
    for table, (plain, _) in _PRESETS.items():
        fields = _fields(values[table])
        del fields["preset"]
        values[table] = plain(**fields)
    return TrainConfig(**values)


def _fields(config: Any) -> dict[str, Any]:
    return {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}


def _last_value(arguments: Sequence[str], option: str) -> str | None:
    """The value of `--option value` or `--option=value`; the last one counts."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == option:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
    return value
