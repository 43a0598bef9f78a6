"""Implementations that were measured to be the fastest on this user's devices.

`megalodon tune` writes them to a file in the user's cache; where an operation is called without an
implementation, its default choice looks here first. Without the file nothing changes.
"""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.common import triton
from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.common.target import find_target

# A choice holds for calls of at least this part of the tokens that were measured.
SMALLEST_PART = 4


class MeasuredChoice(NamedTuple):
    """The fastest implementation of one operation at one shape.

    Attributes:
      operation: "cema", "timestep_norm", "chunk_attention", "noncausal_attention", or a row
        operation's name.
      dtype: dtype of the activations, "bfloat16".
      width: channels; of attention, the width of a value head.
      tokens: tokens of the batch, B L.
      implementation: the fastest that agreed with the reference.
    """

    operation: str
    dtype: str
    width: int
    tokens: int
    implementation: Implementation


def choices_file() -> Path:
    """`$XDG_CACHE_HOME/megalodon/implementations.json`, below `~/.cache` by default."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "megalodon" / "implementations.json"


def find_measured(operation: str, x: Array, *, tokens: int) -> Implementation | None:
    """The implementation measured for an operation on x; None if there is none for such calls.

    Args:
      operation: as in `MeasuredChoice`.
      x: activations, whose dtype and last axis count.
      tokens: tokens of the call.

    Raises:
      ValueError: the file cannot be read.
    """
    for choice in read_choices(find_target().kind):
        if (
            (choice.operation, choice.width) == (operation, x.shape[-1])
            and jnp.dtype(choice.dtype) == x.dtype
            and tokens * SMALLEST_PART >= choice.tokens
            and (choice.implementation != "triton" or triton.is_installed())
        ):
            return choice.implementation
    return None


def read_choices(device_kind: str) -> Sequence[MeasuredChoice]:
    """The choices for a kind of device.

    Raises:
      ValueError: the file cannot be read.
    """
    file = choices_file()
    try:
        changed = file.stat().st_mtime_ns
    except FileNotFoundError:
        return ()
    return _read(file, changed).get(device_kind, ())


def write_choices(device_kind: str, choices: Sequence[MeasuredChoice]) -> Path:
    """Adds choices for a kind of device, in place of those of the same operation and width."""
    file = choices_file()
    table = dict(_read(file, file.stat().st_mtime_ns)) if file.exists() else {}
    new = {(c.operation, c.dtype, c.width): c for c in (*table.get(device_kind, ()), *choices)}
    table[device_kind] = tuple(new.values())
    file.parent.mkdir(parents=True, exist_ok=True)
    text = {kind: [choice._asdict() for choice in found] for kind, found in table.items()}
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(text, indent=1) + "\n")
    unfinished.replace(file)
    return file


def reset_choices() -> bool:
    """Removes all choices; whether there were any."""
    file = choices_file()
    existed = file.exists()
    file.unlink(missing_ok=True)
    return existed


@functools.lru_cache(maxsize=1)
def _read(file: Path, changed: int) -> dict[str, tuple[MeasuredChoice, ...]]:
    del changed  # part of the cache's key
    try:
        table = json.loads(file.read_text())
        return {kind: tuple(MeasuredChoice(**c) for c in found) for kind, found in table.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a table of measured implementations ({error}); remove it with "
            "`megalodon tune --reset`"
        ) from error
