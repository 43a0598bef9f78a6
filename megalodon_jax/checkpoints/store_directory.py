"""The operations of a storage directory (`directory`) in an object store, through fsspec.

A directory of a store is a prefix of names: there is nothing to create, an object is written as a
whole, and there is no rename. A checkpoint there is committed when it has the object
`commit_success.txt`, which Orbax writes last on gs:// and `upload` on s3://.
"""

import contextlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from megalodon_jax.checkpoints.checksums import content_checksum, kind_of
from megalodon_jax.storage.files import store_errors
from megalodon_jax.storage.location import AnyPath, as_path, key_of, run_file_system

COMMIT_MARKER = "commit_success.txt"
"""The object that says that everything before it has been written."""
_BLOCK_BYTES = 1 << 23


class StoreDirectory(ABC):
    """A directory of an object store; the interface is that of `LocalDirectory`."""

    commit_marker = COMMIT_MARKER
    # A read waits for a network, and for a minute if the store is lost.
    is_remote = True

    def __init__(self, path: AnyPath | str) -> None:
        self.path = as_path(path)
        self._key = key_of(self.path)
        self._file_system = run_file_system(self.path)
        self._checksums: dict[str, tuple[str, ...]] = {}

    def __str__(self) -> str:
        return str(self.path)

    def child(self, name: str) -> Self:
        """A directory inside this one."""
        return type(self)(self.path / name)

    def make(self) -> None:  # noqa: B027
        """Does nothing: a prefix exists with its first object."""

    def make_durable(self, names: Collection[str]) -> None:  # noqa: B027
        """Does nothing: a store answers when an object is durable."""

    def exists(self) -> bool:
        """Whether there is an object with this prefix."""
        return bool(self.names())

    def names(self) -> list[str]:
        """Names of the direct entries; empty if there is none."""
        with store_errors(), contextlib.suppress(FileNotFoundError):
            self._file_system.invalidate_cache()
            found = self._file_system.ls(self._key, detail=False)
            prefix = f"{self._key}/"
            return sorted(
                path.rstrip("/").removeprefix(prefix)
                for path in found
                if path.startswith(prefix) and path != prefix
            )
        return []

    def files(self) -> dict[str, int]:
        """Sizes in bytes of all objects with this prefix; their checksums are remembered."""
        with store_errors():
            self._file_system.invalidate_cache()
            found = self._file_system.find(self._key, detail=True)
        prefix = f"{self._key}/"
        entries = {
            path.removeprefix(prefix): entry
            for path, entry in found.items()
            if entry["type"] == "file" and not path.endswith("/")
        }
        self._checksums = {name: self._checksums_of(entry) for name, entry in entries.items()}
        return {name: int(entry["size"]) for name, entry in entries.items()}

    def read(self, name: str) -> bytes:
        """The content of an object."""
        with store_errors():
            return self._file_system.cat_file(f"{self._key}/{name}")

    def checksums(self, name: str) -> tuple[str, ...]:
        """The store's own checksums of an object, from the last listing by `files`."""
        return self._checksums[name]

    def matches(self, name: str, checksums: Sequence[str]) -> bool:
        """Whether an object has the checksums that were listed when it was written.

        Those of the store's metadata are compared, from the last listing by `files`. The content is
        read only if they have no kind in common with the listed ones, or if an ETag differs, which
        a copy of the same content may have.
        """
        own = {kind_of(checksum): checksum for checksum in self._checksums[name]}
        for checksum in checksums:
            kind = kind_of(checksum)
            if own.get(kind) == checksum:
                return True
            if kind in own and kind != "etag":
                return False
        with store_errors():
            return content_checksum(lambda: self._blocks(name), checksums)

    def write(self, name: str, content: bytes) -> None:
        """Writes an object; a reader sees the old or the new content."""
        with store_errors():
            self._file_system.pipe_file(f"{self._key}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        """Creates an object; False if it exists. Only one of several processes succeeds."""
        with store_errors():
            try:
                self._file_system.pipe_file(f"{self._key}/{name}", content, mode="create")
            except FileExistsError:
                # The client repeats a request whose answer was lost.
                return self.read(name) == content
        return True

    @abstractmethod
    def touch(self, name: str) -> None:
        """Changes the version of an object, but not its content; `OSError` if there is none."""

    def version(self, name: str) -> Hashable:
        """A value that differs after each `write` or `touch`; None if there is no such object."""
        with store_errors():
            try:
                self._file_system.invalidate_cache()
                return self._version_of(self._file_system.info(f"{self._key}/{name}"))
            except FileNotFoundError:
                return None

    def age(self, name: str) -> float | None:
        """None: the clock of a store is not compared with that of the machine."""
        return None

    def remove(self, name: str) -> None:
        """Removes an object; does nothing if there is none."""
        with store_errors(), contextlib.suppress(FileNotFoundError):
            self._file_system.rm_file(f"{self._key}/{name}")

    def remove_tree(self, name: str) -> None:
        """Removes a directory; an interrupted removal leaves a checkpoint that is not committed."""
        directory = self.child(name)
        directory.remove(COMMIT_MARKER)
        if paths := [f"{self._key}/{name}/{entry}" for entry in directory.files()]:
            with store_errors():
                self._file_system.rm(paths)

    def move(self, name: str, target: str) -> None:
        """Gives a directory another name: copies it within the store, then removes the original.

        An interruption leaves the original, or the complete copy.
        """
        entries = list(self.child(name).files())
        with store_errors():
            self._file_system.copy(
                [f"{self._key}/{name}/{entry}" for entry in entries],
                [f"{self._key}/{target}/{entry}" for entry in entries],
            )
        self.remove_tree(name)

    def upload(self, source: Path, names: Collection[str]) -> None:
        """Uploads files of a local directory under their names.

        Raises:
          OSError: a file could not be uploaded.
        """
        if not names:
            return
        with store_errors():
            self._file_system.put(
                [str(source / name) for name in names], [f"{self._key}/{name}" for name in names]
            )

    def download(self, target: Path, names: Collection[str]) -> None:
        """Downloads objects into a local directory under their names."""
        if not names:
            return
        with store_errors():
            self._file_system.get(
                [f"{self._key}/{name}" for name in names], [str(target / name) for name in names]
            )

    def _blocks(self, name: str) -> Iterator[bytes]:
        with self._file_system.open(f"{self._key}/{name}", "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block

    @abstractmethod
    def _checksums_of(self, entry: dict[str, Any]) -> tuple[str, ...]:
        """The checksums in an object's metadata."""

    @abstractmethod
    def _version_of(self, entry: dict[str, Any]) -> Hashable:
        """The version in an object's metadata."""


class GcsDirectory(StoreDirectory):
    """A directory of Google Cloud Storage."""

    def touch(self, name: str) -> None:
        # New metadata raise the metageneration and fail for an object that does not exist.
        with store_errors():
            self._file_system.setxattrs(f"{self._key}/{name}", heartbeat=secrets.token_hex(8))

    def _checksums_of(self, entry: dict[str, Any]) -> tuple[str, ...]:
        found = (("crc32c", entry.get("crc32c")), ("md5", entry.get("md5Hash")))
        return tuple(f"{kind}:{value}" for kind, value in found if value)

    def _version_of(self, entry: dict[str, Any]) -> Hashable:
        return entry.get("generation"), entry.get("metageneration")


class S3Directory(StoreDirectory):
    """A directory of S3 or a store with its interface."""

    def touch(self, name: str) -> None:
        # A copy of an object to itself, which changes the time and fails if it does not exist.
        with store_errors():
            self._file_system.setxattr(f"{self._key}/{name}", heartbeat=secrets.token_hex(8))

    def _checksums_of(self, entry: dict[str, Any]) -> tuple[str, ...]:
        etag = str(entry.get("ETag", "")).strip('"')
        return (f"etag:{etag}",) if etag else ()

    def _version_of(self, entry: dict[str, Any]) -> Hashable:
        return entry.get("ETag"), entry.get("LastModified")
