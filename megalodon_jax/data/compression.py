"""Compressed files: .gz, and .zst with Python's own module (3.14) or the package `zstandard`."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import IO, Any

from megalodon_jax.errors import DataError
from megalodon_jax.storage.files import open_binary
from megalodon_jax.storage.location import AnyPath, is_store

# Bytes that are decompressed at a time where the result is discarded.
SKIP_BYTES = 1 << 20


def is_compressed(path: PurePath) -> bool:
    """Whether the suffix is that of a compressed file."""
    return path.suffix in _OPENERS


def inner_suffix(path: PurePath) -> str:
    """The suffix that says what a file holds: `.jsonl` for `a.jsonl` and `a.jsonl.gz`."""
    return PurePath(path.stem).suffix if is_compressed(path) else path.suffix


def open_decompressed(path: AnyPath) -> IO[bytes]:
    """Opens a compressed file as a stream of its decompressed bytes.

    Raises:
      DataError: the file cannot be opened, or the package for its format is not installed.
    """
    with decompression_errors(path):
        return _OPENERS[path.suffix](path)


@contextmanager
def decompression_errors(path: AnyPath) -> Iterator[None]:
    """Turns the errors of reading a compressed file into a `DataError` with its name."""
    try:
        yield
    except DataError:
        raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"cannot decompress {path}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        # `zstandard.ZstdError` and its namesake of Python 3.14, without importing either.
        if type(error).__name__ != "ZstdError":
            raise
        raise DataError(f"cannot decompress {path}: {error}") from error


def _open_gzip(path: AnyPath) -> IO[bytes]:
    if not is_store(path):
        return gzip.open(path)  # type: ignore[return-value]
    file = open_binary(path)
    stream = gzip.GzipFile(fileobj=file, mode="rb")
    # Closed with the stream.
    stream.myfileobj = file  # type: ignore[assignment]
    return stream  # type: ignore[return-value]


def _open_zstandard(path: AnyPath) -> IO[bytes]:
    try:
        from compression import zstd  # pyright: ignore
    except ImportError:
        pass
    else:
        # The stream closes a file that it opened itself only.
        return io.BufferedReader(_ClosingStream(zstd.open, path), SKIP_BYTES)
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{path} is compressed with zstd; install megalodon-flax[zstd] or decompress it"
        ) from error
    return io.BufferedReader(_ZstandardStream(path, zstandard), SKIP_BYTES)


class _ZstandardStream(io.RawIOBase):
    """All frames of a file; the stream readers of `zstandard` 0.25 accept a file cut short."""

    # A block of 4 bytes can stand for 128 KB: at most 128 MB at a time.
    _INPUT_BYTES = 1 << 12

    def __init__(self, path: AnyPath, library: Any):
        super().__init__()
        self._file = open_binary(path)
        self._library = library
        self._frame: Any = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            compressed = self._frame.unused_data if self._frame and self._frame.eof else b""
            compressed = compressed or self._file.read(self._INPUT_BYTES)
            if not compressed:
                if self._frame is None or not self._frame.eof:
                    raise EOFError("the file ends before its last frame does")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            self._output = memoryview(self._frame.decompress(compressed))
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _ClosingStream(io.RawIOBase):
    """A decompressed stream that closes the compressed file too."""

    def __init__(self, open_stream: Callable[[IO[bytes]], Any], path: AnyPath):
        super().__init__()
        self._file = open_binary(path)
        self._stream = open_stream(self._file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()


_OPENERS: dict[str, Callable[[AnyPath], Any]] = {
    ".gz": _open_gzip,
    ".zst": _open_zstandard,
}
COMPRESSED_SUFFIXES = tuple(_OPENERS)
