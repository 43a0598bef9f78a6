"""Validation of configuration fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from megalodon_jax.errors import ConfigError, did_you_mean


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_literals(config: Any, table: str) -> None:
    """Raises `ConfigError` if the value of a `Literal` field is not one of its choices.

    Args:
      config: a dataclass.
      table: name of its TOML table, for the message.
    """
    for entry in dataclasses.fields(config):
        kinds = (entry.type, *get_args(entry.type))
        allowed = [
            value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)
        ]
        value = getattr(config, entry.name)
        if allowed and value is not None:
            require(
                value in allowed,
                f"{table}.{entry.name} is {value!r}; use one of {', '.join(map(repr, allowed))}",
            )


def check_keys(cls: type, table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns the table if all its keys are fields of `cls`.

    Raises:
      ConfigError: a key is unknown; the closest field is suggested.
    """
    names = [entry.name for entry in dataclasses.fields(cls)]
    for key in table:
        require(key in names, f"unknown key {key!r} in {name}{did_you_mean(key, names)}")
    return table
