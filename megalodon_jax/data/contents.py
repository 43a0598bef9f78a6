"""The UTF-8 bytes of one document, read in pieces: memory does not depend on its size."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import IO

from megalodon_jax.data.compression import SKIP_BYTES, decompression_errors, open_decompressed
from megalodon_jax.errors import DataError
from megalodon_jax.storage.files import read_range
from megalodon_jax.storage.location import AnyPath


class Content(ABC):
    """The bytes of one document; for one thread."""

    @abstractmethod
    def num_bytes(self) -> int:
        """Number of bytes; a compressed file is read once to count them."""

    @abstractmethod
    def read(self, start: int, size: int) -> bytes:
        """At most `size` bytes from `start` on; fewer only at the end.

        Raises:
          DataError: the file cannot be read.
        """


class MemoryContent(Content):
    """A document that is in memory."""

    def __init__(self, content: bytes):
        self._content = content

    def num_bytes(self) -> int:
        return len(self._content)

    def read(self, start: int, size: int) -> bytes:
        return self._content[start : start + size]


class FileContent(Content):
    """A range of bytes of a file."""

    def __init__(self, path: AnyPath, start: int, stop: int):
        self._path = path
        self._start = start
        self._stop = stop

    def num_bytes(self) -> int:
        return self._stop - self._start

    def read(self, start: int, size: int) -> bytes:
        size = min(size, self.num_bytes() - start)
        if size <= 0:
            return b""
        content = with_data_error(
            self._path, lambda: read_range(self._path, self._start + start, size)
        )
        if len(content) < size:
            raise DataError(f"{self._path} has become shorter while it was read")
        return content


class CompressedContent(Content):
    """The decompressed bytes of a whole file; reading backward decompresses it anew."""

    def __init__(self, path: AnyPath):
        self._path = path
        self._stream: IO[bytes] | None = None
        self._position = 0

    def num_bytes(self) -> int:
        self._move_to(0)
        while self._skip(SKIP_BYTES):
            pass
        return self._position

    def read(self, start: int, size: int) -> bytes:
        self._move_to(start)
        parts = []
        while size > 0 and (part := self._read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _move_to(self, start: int) -> None:
        if self._stream is None or start < self._position:
            if self._stream is not None:
                self._stream.close()
            self._stream = open_decompressed(self._path)
            self._position = 0
        while self._position < start and self._skip(min(SKIP_BYTES, start - self._position)):
            pass

    def _skip(self, size: int) -> int:
        return len(self._read(size))

    def _read(self, size: int) -> bytes:
        assert self._stream is not None
        with decompression_errors(self._path):
            part = self._stream.read(size)
        self._position += len(part)
        return part


class SliceContent(Content):
    """A range of bytes of another document."""

    def __init__(self, whole: Content, start: int, stop: int):
        self._whole = whole
        self._start = start
        self._stop = stop

    def num_bytes(self) -> int:
        return self._stop - self._start

    def read(self, start: int, size: int) -> bytes:
        size = min(size, self.num_bytes() - start)
        return self._whole.read(self._start + start, size) if size > 0 else b""


def read_all(content: Content) -> bytes:
    """All bytes of a document."""
    parts, position = [], 0
    while part := content.read(position, SKIP_BYTES):
        parts.append(part)
        position += len(part)
    return b"".join(parts)


def with_data_error[T](path: AnyPath, read: Callable[[], T]) -> T:
    """The result of `read`; its `OSError` becomes a `DataError` that names the file."""
    try:
        return read()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
