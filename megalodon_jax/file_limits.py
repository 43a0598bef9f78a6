"""Limits on files that come from others: their kind, their size, and how far they expand.

A limit is far above any real file. The environment variable `MEGALODON_FILE_LIMITS` multiplies all
of them: 10 allows ten times as much.
"""

import json
import os
from typing import Any

from megalodon_jax.storage.files import kind_of, open_binary, size_of
from megalodon_jax.storage.location import AnyPath

LIMITS_VARIABLE = "MEGALODON_FILE_LIMITS"
MAX_EXPANSION = 100
"""Decompressed bytes per compressed byte: text reaches 10, zeros reach deflate's most, 1,032."""
MAX_METADATA_BYTES = 64_000_000
"""Bytes of the part of a checkpoint that describes the tensors: pickle, JSON header, config."""
MAX_TOKENIZER_BYTES = 200_000_000
"""Bytes of a tokenizer file; the largest published ones have 35 MB."""


class FileLimitError(ValueError):
    """A file is not a regular one or exceeds a limit; the message does not name the file."""


def scaled(limit: int) -> int:
    """A limit times the factor in the environment variable `MEGALODON_FILE_LIMITS`.

    Raises:
      FileLimitError: the variable is not a positive number.
    """
    text = os.environ.get(LIMITS_VARIABLE, "1")
    try:
        factor = float(text)
        if not 0.0 < factor < 1e6:
            raise ValueError
    except ValueError:
        raise FileLimitError(f"{LIMITS_VARIABLE} is {text!r}; use a factor such as 10") from None
    return int(limit * factor)


def check_size(num_bytes: int, limit: int, what: str = "the file") -> None:
    """Checks a size that a file has or declares.

    Raises:
      FileLimitError: it is above the scaled limit.
    """
    allowed = scaled(limit)
    if num_bytes > allowed:
        raise FileLimitError(
            f"{what} has {num_bytes:,} bytes, more than the limit of {allowed:,}; if it can be "
            f"trusted, set {LIMITS_VARIABLE}=10 or more"
        )


def check_regular(path: str | AnyPath) -> int:
    """The size of a regular file; devices and pipes, which may never end, are refused.

    Raises:
      FileLimitError: it is a directory, device, pipe or socket, or its name cannot be a path.
      OSError: it does not exist or cannot be examined.
    """
    try:
        kind = kind_of(path)
    except ValueError as error:
        raise FileLimitError(f"not a path: {error}") from error
    if kind != "file":
        found = "a directory" if kind == "directory" else "a device, pipe or socket"
        raise FileLimitError(f"it is {found}; give a regular file")
    return size_of(path)


def read_bytes(path: str | AnyPath, *, max_bytes: int) -> bytes:
    """The content of a regular file within the limit.

    Raises:
      FileLimitError: the file is not a regular one, or is larger.
      OSError: it cannot be read.
    """
    check_size(check_regular(path), max_bytes)
    allowed = scaled(max_bytes)
    with open_binary(path) as file:
        # A file that grows is read to the limit only; files in /proc have size 0.
        content = file.read(allowed + 1)
    check_size(len(content), max_bytes)
    return content


def read_json_table(
    path: str | AnyPath, *, max_bytes: int, error: type[Exception]
) -> dict[str, Any]:
    """The object in a JSON file within the limit.

    Args:
      path: the file.
      max_bytes: limit of its size.
      error: type of the error, whose message names the file.

    Raises:
      Exception: of type `error`; the file cannot be read, is no JSON, or holds no object.
    """
    try:
        table = json.loads(read_bytes(path, max_bytes=max_bytes).decode("utf-8"))
    # ValueError: not UTF-8, not JSON, too large; RecursionError: of nested brackets.
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"cannot read {path} as JSON: {cause}") from cause
    if not isinstance(table, dict):
        raise error(f"{path} has a {type(table).__name__}; it must be a table")
    return table
