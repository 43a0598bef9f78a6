"""A run's configuration on the command line: a TOML file, presets, then single settings."""

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    """A configuration with one more setting: the preset that the others start from."""
    names: Any = Literal[tuple(preset_names(kind))]
    help_text = "Named values for all other settings of this table; options change single ones."
    preset = Annotated[names | None, tyro.conf.arg(help=help_text)]
    return dataclasses.make_dataclass(
        config.__name__,
        [("preset", preset, field(default=None))],
        bases=(config,),
        frozen=True,
        kw_only=True,
    )


_ModelSettings = _with_preset(ModelConfig, "models")
_MeshSettings = _with_preset(MeshConfig, "meshes")
# Tables with presets: the plain configuration, and the one with the setting `preset`.
_PRESETS: dict[str, tuple[type[ModelConfig] | type[MeshConfig], Any]] = {
    "model": (ModelConfig, _ModelSettings),
    "mesh": (MeshConfig, _MeshSettings),
}
if TYPE_CHECKING:
    RunSettings = TrainConfig
else:
    # Booleans of tables take True or False; those of the run itself, such as --resume, are flags.
    RunSettings = dataclasses.make_dataclass(
        "RunSettings",
        [
            (name, Annotated[kind, tyro.conf.FlagConversionOff], field(default_factory=kind))
            for name, kind in (
                ("model", _ModelSettings),
                ("data", DataConfig),
                ("optim", OptimConfig),
                ("mesh", _MeshSettings),
                ("processes", ProcessesConfig),
            )
        ],
        bases=(TrainConfig,),
        frozen=True,
        kw_only=True,
    )


def default_settings(arguments: Sequence[str]) -> RunSettings:
    """The settings before single options: those of the config file, with presets applied.

    Args:
      arguments: the command's arguments, CONFIG first.

    Raises:
      ConfigError: CONFIG is missing, or there is no such file, shipped configuration or preset.
    """
    name = next(iter(arguments), "")
    if name and not name.startswith("-"):
        config = load_config(find_config(name))
    elif {"-h", "--help"}.isdisjoint(arguments):
        raise ConfigError(
            "no config given; the first argument is a TOML file or one of "
            f"{', '.join(config_names())}"
        )
    else:
        config = TrainConfig()
    values = _fields(config)
    for table, (plain, settings) in _PRESETS.items():
        preset = _last_value(arguments, f"--{table}.preset")
        base = values[table] if preset is None else plain.from_preset(preset)
        values[table] = settings(**_fields(base), preset=preset)
    return RunSettings(**values)


def to_config(settings: RunSettings) -> TrainConfig:
    """The plain configuration of parsed settings."""
    values = _fields(settings)
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
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
    return value
