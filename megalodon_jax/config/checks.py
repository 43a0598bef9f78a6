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


def number_or_none(kind: Any) -> type | None:
    """int or float where the type of a field is `int | None` or `float | None`, else None."""
    kinds = [choice for choice in get_args(kind) if choice is not type(None)]
    is_optional = type(None) in get_args(kind) and len(kinds) == 1
    return kinds[0] if is_optional and kinds[0] in (int, float) else None


def none_from_text(cls: type, table: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of a TOML table with None in place of "none" in fields of `number_or_none`.

    TOML has no null.

    Raises:
      ConfigError: such a field has another text.
    """
    copy = dict(table)
    for entry in dataclasses.fields(cls):
        value = copy.get(entry.name)
        if isinstance(value, str) and (number := number_or_none(entry.type)):
            require(
                value == "none",
                f"{name}.{entry.name} is {value!r}; use a number of type {number.__name__}, or "
                '"none"',
            )
            copy[entry.name] = None
    return copy


def check_keys(cls: type, table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns the table if all its keys are fields of `cls`.

    Raises:
      ConfigError: a key is unknown; the closest field is suggested.
    """
    names = [entry.name for entry in dataclasses.fields(cls)]
    for key in table:
        require(key in names, f"unknown key {key!r} in {name}{did_you_mean(key, names)}")
    return table
