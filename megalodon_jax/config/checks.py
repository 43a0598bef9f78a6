"""Checks of a configuration: types, choices, ranges, rules, and unknown keys.

Every configuration class calls `check` when it is built, whatever builds it: Python, a TOML file or
the command line. All faults of a class are in one error; under `collect_faults` those of all tables
are.
"""

import contextlib
import contextvars
import dataclasses
import functools
import numbers
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

from megalodon_jax.config.ranges import Range, Text, plain_type, range_of
from megalodon_jax.errors import ConfigError, did_you_mean

# A list while `collect_faults` is active.
_COLLECTED: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "collected_faults", default=None
)

# Advice on values that are often asked for and are no choice.
_HINTS = {
    "float16": "; float16 overflows (at 65,504) in gated products and needs loss scaling: use "
    "'bfloat16'"
}

_MAX_LISTED = 30


class Rule(NamedTuple):
    """A condition between the settings of a configuration.

    Attributes:
      holds: the condition, given the configuration.
      message: text with replacement fields of `c`, the configuration, such as {c.steps}.
    """

    holds: Callable[[Any], bool]
    message: str


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check(config: Any, table: str, rules: tuple[Rule, ...] = ()) -> None:
    """Checks the types, choices and ranges of all fields, and the rules between them.

    A rule about a field that is at fault itself is not evaluated.

    Args:
      config: a dataclass.
      table: name of its TOML table, for messages; empty: the top level.
      rules: conditions between fields.

    Raises:
      ConfigError: a field or a rule is violated; the message has all faults. Not raised under
        `collect_faults`.
    """
    faults = list(field_faults(config, table).values())
    guarded = _guarded(config)
    for rule in rules:
        # A rule that reads a field at fault ends in _FieldAtFault.
        with contextlib.suppress(_FieldAtFault):
            if not rule.holds(guarded):
                faults.append(rule.message.format(c=guarded))
    collected = _COLLECTED.get()
    if collected is not None:
        collected += faults
    elif faults:
        raise ConfigError(_listed(faults))


@contextlib.contextmanager
def collect_faults() -> Iterator[list[str]]:
    """Collects the faults of all configurations that are built inside, instead of raising.

    Raises:
      ConfigError: on exit, if there is a fault; the message has all of them.
    """
    faults: list[str] = []
    token = _COLLECTED.set(faults)
    try:
        yield faults
    finally:
        _COLLECTED.reset(token)
    if faults:
        raise ConfigError(_listed(list(dict.fromkeys(faults))))


def _listed(faults: list[str], limit: int = _MAX_LISTED) -> str:
    more = f"; and {len(faults) - limit} more" if len(faults) > limit else ""
    return "; ".join(faults[:limit]) + more


def field_faults(config: Any, table: str) -> dict[str, str]:
    """The faults of single fields of a dataclass, by name; nested tables check themselves."""
    faults = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        setting = f"{table}.{entry.name}" if table else entry.name
        if fault := _field_fault(setting, entry.type, value):
            faults[entry.name] = fault
    return faults


def _field_fault(setting: str, annotated: Any, value: Any) -> str | None:
    """The fault of one value, or None."""
    kind, allowed = plain_type(annotated), range_of(annotated)
    choices = choices_of(kind)
    if value is None and type(None) in get_args(kind):
        return None
    if choices:
        listed = ", ".join(map(repr, choices))
        is_choice = isinstance(value, str) and value in choices
        hint = _HINTS.get(value, "") if isinstance(value, str) else ""
        return None if is_choice else f"{setting} is {shown(value)}; use one of {listed}{hint}"
    if tables := _table_types(kind):
        names = " or ".join(table.__name__ for table in tables)
        is_table = isinstance(value, tables)
        return None if is_table else f"{setting} is {shown(value)}; give a {names}"
    scalar = scalar_type(kind)
    if scalar is None:
        return _list_fault(setting, kind, value) if get_origin(kind) is tuple else None
    if not _has_type(value, scalar):
        return f"{shown(value)} is not of type {scalar.__name__}: {setting}"
    if scalar is bool:
        return None
    if allowed is None:
        allowed = Text() if scalar is str else Range()
    if problem := allowed.problem(value):
        optional = ", or None" if type(None) in get_args(kind) else ""
        return f"{setting} is {shown(value)}; {problem}{optional}"
    return None


def _list_fault(setting: str, kind: Any, value: Any) -> str | None:
    table = table_of_list(kind)
    if not isinstance(value, list | tuple):
        return f"{setting} is {shown(value)}; use a list of {'tables' if table else 'texts'}"
    if table is not None:
        wrong = next((entry for entry in value if not isinstance(entry, table)), None)
        return None if wrong is None else f"{setting} has the entry {shown(wrong)}; use a table"
    # All lists of texts are paths of files.
    path = Text(may_be_empty=False, location="any")
    for entry in value:
        problem = path.problem(entry) if isinstance(entry, str) else "use a text"
        if problem:
            return f"{setting} has the entry {shown(entry)}; {problem}"
    return None


def _table_types(kind: Any) -> tuple[type, ...]:
    """The dataclass, or the dataclasses of a union, that a field has; empty for other fields."""
    kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return tuple(
        each for each in kinds if dataclasses.is_dataclass(each) and isinstance(each, type)
    )


def table_of_list(kind: Any) -> type | None:
    """The dataclass of a field whose type is a tuple of dataclasses, else None."""
    kind = plain_type(kind)
    entry = get_args(kind)[0] if get_origin(kind) is tuple else None
    return entry if isinstance(entry, type) and dataclasses.is_dataclass(entry) else None


def choices_of(kind: Any) -> list[Any]:
    """The values of a `Literal`, also of an optional one."""
    kinds = (kind, *get_args(kind))
    return [value for each in kinds if get_origin(each) is Literal for value in get_args(each)]


def scalar_type(kind: Any) -> type | None:
    """int, float, str or bool where a field has this type, or it or None; else None."""
    kinds = [choice for choice in get_args(kind) or (kind,) if choice is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, str, bool) else None


def _has_type(value: Any, scalar: type) -> bool:
    if scalar in (str, bool):
        return isinstance(value, scalar)
    number = numbers.Integral if scalar is int else numbers.Real
    return isinstance(value, number) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value in a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write very long integers
        return "a number of more than 4,300 digits"
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 80 else f"{text[:77]}..."


class _FieldAtFault(Exception):  # noqa: N818  (control flow, never seen by a caller)
    pass


def _guarded(config: Any) -> Any:
    """A view of a configuration that raises `_FieldAtFault` when a field at fault is read."""
    values = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    view = object.__new__(_guarded_class(type(config)))
    nested = {
        name: _guarded(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
    }
    view.__dict__.update(nested, _at_fault=frozenset(field_faults(config, "")))
    return view


@functools.cache
def _guarded_class(cls: type) -> type:
    class Guarded(cls):
        _at_fault: frozenset[str] = frozenset()

        def __getattribute__(self, name: str) -> Any:
            if name in object.__getattribute__(self, "_at_fault"):
                raise _FieldAtFault(name)
            return super().__getattribute__(name)

    return Guarded


def number_or_none(kind: Any) -> type | None:
    """int or float where the type of a field is `int | None` or `float | None`, else None."""
    kind = plain_type(kind)
    scalar = scalar_type(kind)
    return scalar if scalar in (int, float) and type(None) in get_args(kind) else None


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
            message = (
                f"{name}.{entry.name} is {shown(value)}; use a number of type {number.__name__}, "
                'or "none"'
            )
            if value != "none":
                add_fault(message)
            copy[entry.name] = None
    return copy


def check_keys(cls: type, table: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entries of the table whose keys are fields of `cls`.

    Raises:
      ConfigError: a key is unknown; the closest field is suggested. Not raised under
        `collect_faults`.
    """
    names = [entry.name for entry in dataclasses.fields(cls)]
    for i, key in enumerate(key for key in table if key not in names):
        # A search takes 0.1 ms, and later faults are not listed.
        advice = did_you_mean(str(key)[:80], names) if i < _MAX_LISTED else ""
        add_fault(f"unknown key {shown(key)} in {name}{advice}")
    return {key: value for key, value in table.items() if key in names}


def add_fault(message: str) -> None:
    """Adds a fault to those of `collect_faults`; outside it raises `ConfigError(message)`."""
    collected = _COLLECTED.get()
    if collected is None:
        raise ConfigError(message)
    collected.append(message)
