"""Writes nested tables as TOML, which Python's library only reads."""

import json
from collections.abc import Mapping
from typing import Any


def to_toml(table: Mapping[str, Any]) -> str:
    """The table as TOML: strings, numbers, booleans, lists of them, tables and lists of tables."""
    return "\n".join(_lines(table, "")) + "\n"


def _lines(table: Mapping[str, Any], path: str) -> list[str]:
    lines, nested = [], []
    for key, value in table.items():
        where = f"{path}{key}"
        if isinstance(value, Mapping):
            nested += [f"[{where}]", *_lines(value, f"{where}.")]
        elif isinstance(value, list) and value and all(isinstance(e, Mapping) for e in value):
            for entry in value:
                nested += [f"[[{where}]]", *_lines(entry, f"{where}.")]
        else:
            lines.append(f"{key} = {_scalar(value)}")
    return [*lines, *nested]


def _scalar(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_scalar(entry) for entry in value)}]"
    # Strings, whole numbers and booleans of JSON are TOML's; TOML has no escape for DEL.
    text = json.dumps(value).replace("\x7f", "\\u007f")
    return (
        text.replace("Infinity", "inf").replace("NaN", "nan") if isinstance(value, float) else text
    )
