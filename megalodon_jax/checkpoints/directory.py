"""The operations of a storage directory that checkpoints and locks need.

There is no append and no rename of a file, which an object store lacks: exclusive creation, atomic
writes and versions have an equivalent there (`store_directory`).
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Collection, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megalodon_jax.checkpoints.checksums import compute, content_checksum
from megalodon_jax.checkpoints.store_directory import GcsDirectory, S3Directory
from megalodon_jax.storage.location import AnyPath, scheme_of

_BLOCK_BYTES = 1 << 20
_SYNC_THREADS = 8


class LocalDirectory:
    """A directory of a mounted file system, local or shared by several hosts.

    Names are paths relative to the directory, with "/" between their parts.
    """

    # A checkpoint gets its final name when it is committed.
    commit_marker = None
    is_remote = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    def __str__(self) -> str:
        return str(self.path)

    def child(self, name: str) -> "LocalDirectory":
        """A directory inside this one."""
        return LocalDirectory(self.path / name)

    def make(self) -> None:
        """Creates the directory and its parents."""
        self.path.mkdir(parents=True, exist_ok=True)

    def exists(self) -> bool:
        """Whether there is such a directory."""
        return self.path.is_dir()

    def names(self) -> list[str]:
        """Names of the direct entries; empty if the directory does not exist."""
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []

    def files(self) -> dict[str, int]:
        """Sizes in bytes of all files, also those in subdirectories; -1: not a regular file."""
        found: dict[str, int] = {}
        pending = [""]
        while pending:
            prefix = pending.pop()
            with os.scandir(self.path / prefix) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{prefix}{entry.name}/")
                        continue
                    is_regular = entry.is_file(follow_symlinks=False)
                    size = entry.stat(follow_symlinks=False).st_size if is_regular else -1
                    found[f"{prefix}{entry.name}"] = size
        return found

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return (self.path / name).read_bytes()

    def checksums(self, name: str) -> tuple[str, ...]:
        """SHA-256 of a file's content as hexadecimal digits."""
        return (compute(self._blocks(name), "sha256"),)

    def matches(self, name: str, checksums: Sequence[str]) -> bool:
        """Whether a file has the checksums that were listed when it was written."""
        return content_checksum(lambda: self._blocks(name), checksums)

    def _blocks(self, name: str) -> Iterator[memoryview]:
        """The content in blocks, each valid until the next one."""
        buffer = bytearray(_BLOCK_BYTES)
        view = memoryview(buffer)
        with open(self.path / name, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield view[:count]

    def write(self, name: str, content: bytes) -> None:
        """Writes a file so that a reader sees the old or the new content, also after a crash."""
        temporary = self.path / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            self._write_new(temporary, content)
            os.replace(temporary, self.path / name)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_names(self.path)

    def create(self, name: str, content: bytes) -> bool:
        """Creates a file; False if it exists. Only one of several processes succeeds.

        A reader may see a part of the content.
        """
        try:
            self._write_new(self.path / name, content)
        except FileExistsError:
            return False
        _sync_names(self.path)
        return True

    def make_durable(self, names: Collection[str]) -> None:
        """Waits until these files and their names are on the disk, safe from a crash of the host.

        Without it a file system may write the content half a minute after the names.
        """
        # Threads: the file system commits several files at once, here ten times as fast.
        with ThreadPoolExecutor(_SYNC_THREADS) as pool:
            list(pool.map(lambda name: _sync(self.path / name), names))
        folders = {folder for name in names for folder in (self.path / name).parents}
        for folder in folders:
            if folder.is_relative_to(self.path.parent):
                _sync_names(folder)

    def touch(self, name: str) -> None:
        """Changes the version of a file, but not its content."""
        os.utime(self.path / name)

    def version(self, name: str) -> Hashable:
        """A value that differs after each `write` or `touch`; None if there is no such file."""
        try:
            status = os.stat(self.path / name)
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino

    def age(self, name: str) -> float | None:
        """Seconds since the last `write` or `touch`; None if there is no such file."""
        try:
            return time.time() - os.stat(self.path / name).st_mtime
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Removes a file; does nothing if there is none."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path / name)

    def remove_tree(self, name: str) -> None:
        """Removes a directory and its content."""
        shutil.rmtree(self.path / name)

    def move(self, name: str, target: str) -> None:
        """Gives a directory another name."""
        os.rename(self.path / name, self.path / target)

    def _write_new(self, path: Path, content: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


Directory = LocalDirectory | GcsDirectory | S3Directory


def open_directory(path: str | AnyPath) -> Directory:
    """The directory of a path or URL; nothing is created.

    Raises:
      ConfigError: the URL's scheme is unknown, or its package is not installed.
    """
    match scheme_of(path):
        case "gs":
            return GcsDirectory(path)
        case "s3":
            return S3Directory(path)
    return LocalDirectory(Path(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Makes new names durable; some network file systems refuse to sync a directory."""
    with contextlib.suppress(OSError):
        _sync(folder)
