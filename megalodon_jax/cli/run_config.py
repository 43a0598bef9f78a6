"""A run's configuration on the command line: a TOML file, presets, then single settings."""

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from megalodon_jax.cli.help import described
from megalodon_jax.config import (
    DataConfig,
    ExamplesConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    ProcessesConfig,
    SftConfig,
    TrainConfig,
    load_config,
    model_preset,
)
from megalodon_jax.config.kinds import MODEL_CONFIGS
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
        bases=(described(config),),
        namespace={"__doc__": config.__doc__},
        frozen=True,
        kw_only=True,
    )


# The tables of a run: the plain configuration, and the same with help texts and presets. A run's
# model is of one kind.
_TABLES: dict[str, tuple[Any, Any]] = {
    "data": (DataConfig, described(DataConfig)),
    "optim": (OptimConfig, described(OptimConfig)),
    "lora": (LoraConfig, described(LoraConfig)),
    "sft": (SftConfig, described(SftConfig)),
    "examples": (ExamplesConfig, described(ExamplesConfig)),
    "mesh": (MeshConfig, _with_preset(MeshConfig, "meshes")),
    "processes": (ProcessesConfig, described(ProcessesConfig)),
}
_MODELS: dict[str, tuple[Any, Any]] = {
    kind: (config, _with_preset(config, "models")) for kind, config in MODEL_CONFIGS.items()
}


def _settings_class(kind: str) -> Any:
    """The settings of a run whose model is of this kind."""
    tables = {"model": _MODELS[kind], **_TABLES}
    # Booleans of tables take True or False; those of the run itself, such as --resume, are flags.
    return dataclasses.make_dataclass(
        "RunSettings",
        [
            (name, Annotated[table, tyro.conf.FlagConversionOff], field(default_factory=table))
            for name, (_, table) in tables.items()
        ],
        bases=(described(TrainConfig),),
        frozen=True,
        kw_only=True,
    )


_SETTINGS = {kind: _settings_class(kind) for kind in MODEL_CONFIGS}
if TYPE_CHECKING:
    RunSettings = TrainConfig
else:
    RunSettings = _SETTINGS["megalodon"]


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
    presets: dict[str, Any] = {}
    if preset := _last_value(arguments, "--model.preset"):
        config = dataclasses.replace(config, model=model_preset(preset))
        presets["model"] = preset
    if preset := _last_value(arguments, "--mesh.preset"):
        config = dataclasses.replace(config, mesh=MeshConfig.from_preset(preset))
        presets["mesh"] = preset
    values, kind = _fields(config), config.model.kind
    for table, (_, settings) in {"model": _MODELS[kind], **_TABLES}.items():
        fields = _fields(values[table])
        if table in presets:
            fields["preset"] = presets[table]
        values[table] = settings(**fields)
    return _SETTINGS[kind](**values)


def to_config(settings: RunSettings) -> TrainConfig:
    """The plain configuration of parsed settings."""
    values = _fields(settings)
    for table, (plain, _) in {"model": _MODELS[settings.model.kind], **_TABLES}.items():
        fields = _fields(values[table])
        fields.pop("preset", None)
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
