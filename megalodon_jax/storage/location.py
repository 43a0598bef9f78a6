"""The kind of a path: a local one, or a URL of an object store (`gs://`, `s3://`).

Every other module asks this one. Importing it is cheap; the packages of the stores are imported on
first use.
"""

import functools
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megalodon_jax.errors import ConfigError

if TYPE_CHECKING:
    from etils import epath

type AnyPath = Path | epath.Path
"""A path of `pathlib`, or of `etils.epath` for a URL."""

# A scheme has two letters or more: one is a drive. The second slash is lost where a URL went
# through `pathlib`.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)([^/]*)")


class _Store(NamedTuple):
    """How an object store is reached.

    Attributes:
      package: the fsspec file system, a distribution of the same name.
      extra: extra of this distribution that installs it.
    """

    package: str
    extra: str


_STORES = {"gs": _Store("gcsfs", "gcs"), "s3": _Store("s3fs", "s3")}


def scheme_of(path: str | AnyPath) -> str:
    """`"gs"` or `"s3"`; empty for a local path.

    Raises:
      ConfigError: a URL with another scheme, or without a bucket.
    """
    if isinstance(path, Path):
        return ""
    if problem := location_problem(str(path)):
        raise ConfigError(f"{str(path)!r}: {problem}")
    match = _URL.match(str(path))
    return match[1] if match else ""


def is_store(path: str | AnyPath) -> bool:
    """Whether a path is a URL of an object store; raises as `scheme_of`."""
    return bool(scheme_of(path))


def location_problem(text: str) -> str | None:
    """Why a text can be neither a local path nor a URL of a known store; None if it can."""
    match = _URL.match(text)
    if match is None:
        return None
    scheme, slashes, bucket = match.groups()
    if scheme not in _STORES:
        known = " or ".join(f"{name}://" for name in _STORES)
        return f"unknown scheme {scheme}:; use {known}, or a local path (./{text} is one)"
    if len(slashes) != 2 or not bucket:
        return f"not a URL of a bucket; write {scheme}://BUCKET/PATH"
    return None


def require_installed(paths: Iterable[str | AnyPath]) -> None:
    """Checks that the packages for the schemes of all paths are installed; opens nothing.

    Raises:
      ConfigError: one is not, or a scheme is unknown.
    """
    for path in paths:
        store = _STORES.get(scheme_of(path))
        if store is not None and importlib.util.find_spec(store.package) is None:
            raise ConfigError(
                f"{str(path)!r} needs the package {store.package}; install it with "
                f'pip install "megalodon-flax[{store.extra}]"'
            )


def as_path(path: str | AnyPath) -> AnyPath:
    """A path object: of `pathlib` for a local path, of `etils.epath` for a URL.

    Raises:
      ConfigError: as `require_installed`.
    """
    if not is_store(path):
        return Path(path)
    require_installed([path])
    from etils import epath

    return epath.Path(path)


def key_of(path: str | AnyPath) -> str:
    """Bucket and name of an object, as fsspec writes them: `bucket/name`."""
    return str(path).partition("://")[2].rstrip("/")


def run_file_system(path: str | AnyPath) -> Any:
    """The fsspec file system of a run's directory: the one that `epath`, and so Orbax, uses.

    It caches listings. One instance sees its own changes; those of other processes are seen after
    `invalidate_cache()`.
    """
    require_installed([path])
    from etils.epath import backend

    return backend.fsspec_backend.fs(str(path))


@functools.cache
def data_file_system(scheme: str) -> Any:
    """The fsspec file system of data, whose listings may be cached: data do not change."""
    require_installed([f"{scheme}://bucket"])
    import fsspec

    return fsspec.filesystem(scheme)
