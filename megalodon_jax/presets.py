"""The shipped TOML files: model sizes, meshes and training runs, by name."""

import tomllib
from pathlib import Path
from typing import Any, Literal

from megalodon_jax.errors import ConfigError, did_you_mean

PresetKind = Literal["models", "meshes"]
# The table of a preset's file that holds its values.
_TABLES: dict[PresetKind, str] = {"models": "model", "meshes": "mesh"}


def configs_dir() -> Path:
    """Directory of the shipped TOML files: in the package if installed, else in the checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def preset_names(kind: PresetKind = "models") -> list[str]:
    """Names of the shipped model sizes or meshes."""
    return sorted(path.stem for path in (configs_dir() / kind).glob("*.toml"))


def read_preset(kind: PresetKind, name: str) -> dict[str, Any]:
    """The values of one preset.

    Raises:
      ConfigError: there is no such preset; the closest name is suggested.
    """
    names, table = preset_names(kind), _TABLES[kind]
    if name not in names:
        raise ConfigError(
            f"no {table} preset {name!r}{did_you_mean(name, names)}; there are: {', '.join(names)}"
        )
    return tomllib.loads((configs_dir() / kind / f"{name}.toml").read_text())[table]


def config_names() -> list[str]:
    """Names of the shipped training configurations, such as `first_run` and `pods/v5e_256`."""
    folder = configs_dir()
    found = [path for group in ("", "pods/", "tasks/") for path in folder.glob(f"{group}*.toml")]
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)


def study_names() -> list[str]:
    """Names of the shipped studies."""
    return sorted(path.stem for path in configs_dir().glob("studies/*.toml"))


def find_study(name: str) -> Path:
    """Path of a study: a TOML file, or a shipped one by its name.

    Raises:
      ConfigError: there is neither; the closest shipped name is suggested.
    """
    if name.endswith(".toml") or Path(name).is_file():
        return Path(name)
    names = study_names()
    if name in names:
        return configs_dir() / "studies" / f"{name}.toml"
    raise ConfigError(
        f"no file or shipped study {name!r}{did_you_mean(name, names)}; shipped: {', '.join(names)}"
    )


def find_config(name: str) -> Path:
    """Path of a training configuration: a TOML file, or a shipped one by its name.

    Raises:
      ConfigError: there is neither; the closest shipped name is suggested.
    """
    if name.endswith(".toml") or Path(name).is_file():
        return Path(name)
    names = config_names()
    if name in names:
        return configs_dir() / f"{name}.toml"
    raise ConfigError(
        f"no config file or shipped config {name!r}{did_you_mean(name, names)}; "
        f"shipped: {', '.join(names)}"
    )
