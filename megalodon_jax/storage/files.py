"""Reading of files, local or in an object store.

Errors of a store's client, which raises the types of several libraries, become `OSError`.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megalodon_jax.errors import MegalodonError
from megalodon_jax.storage.location import (
    AnyPath,
    data_file_system,
    is_store,
    key_of,
    scheme_of,
)

# Bytes that a sequential reader of an object requests at a time.
_BLOCK_BYTES = 1 << 22


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Turns the errors of a store's client into `OSError`."""
    try:
        yield
    except (OSError, MegalodonError):
        raise
    # HTTP clients, authentication libraries and the stores' own errors have no common base.
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def errors_of(path: str | AnyPath) -> contextlib.AbstractContextManager[None]:
    """`store_errors` for a path in a store; nothing for a local one."""
    return store_errors() if is_store(path) else contextlib.nullcontext()


def file_system_of(path: str | AnyPath) -> tuple[str, Any]:
    """The name of a data file in its file system, and the fsspec file system; None: a local one."""
    if not is_store(path):
        return str(path), None
    return key_of(path), data_file_system(scheme_of(path))


def open_binary(path: str | AnyPath, *, buffering: int = -1) -> IO[bytes]:
    """Opens a file for sequential reading; `buffering` is that of a local file."""
    name, file_system = file_system_of(path)
    if file_system is None:
        return Path(path).open("rb", buffering=buffering)
    with store_errors():
        return file_system.open(
            name, "rb", block_size=_BLOCK_BYTES, cache_type="readahead", fill_cache=False
        )


def read_range(path: str | AnyPath, start: int, size: int) -> bytes:
    """At most `size` bytes from `start` on, fewer at the end; one request in a store."""
    name, file_system = file_system_of(path)
    if file_system is not None:
        with store_errors():
            return file_system.cat_file(name, start=start, end=start + size)
    with Path(path).open("rb", buffering=0) as file:
        file.seek(start)
        parts = []
        while size > 0 and (part := file.read(size)):
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def size_of(path: str | AnyPath) -> int:
    """The size of a file in bytes."""
    name, file_system = file_system_of(path)
    if file_system is None:
        return os.stat(path).st_size
    with store_errors():
        return int(file_system.info(name)["size"])


def kind_of(path: str | AnyPath) -> str:
    """`"file"`, `"directory"`, or `"other"`: a device, pipe or socket.

    Raises:
      OSError: it does not exist or cannot be examined.
      ValueError: its name cannot be a path.
    """
    name, file_system = file_system_of(path)
    if file_system is not None:
        with store_errors():
            return file_system.info(name)["type"]
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return "file"
    return "directory" if stat.S_ISDIR(mode) else "other"


def exists(path: str | AnyPath) -> bool:
    """Whether there is a file or directory of this name."""
    name, file_system = file_system_of(path)
    if file_system is None:
        return os.path.exists(path)
    with store_errors():
        return bool(file_system.exists(name))
