"""Documents in files: plain text, .gz, .jsonl and .parquet, read one document at a time.

Opening a file finds the documents' byte ranges; texts are read on access. Memory: 16 bytes per
document, the decompressed bytes of a .gz file with several documents, and the text column of a
.parquet file (once per process, not decoded). These buffers are not pickled.
"""

import contextlib
import functools
import glob
import gzip
import json
import mmap
import os
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from megalodon_jax.errors import DataError

# One lock for all files: only the first access to a file's content is contended.
_LOAD_LOCK = threading.Lock()


class TextFile(ABC):
    """The documents of one file.

    Attributes:
      path: the file's path.
      name: the file's name in document names, the same on every machine.
    """

    def __init__(self, path: Path, name: str):
        self.path = path
        self.name = name
        self.num_bytes = _with_data_error(path, lambda: path.stat().st_size)

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @abstractmethod
    def text(self, index: int) -> str:
        """The text of one document; empty for a null.

        Raises:
          DataError: the file cannot be read, is not UTF-8, or the document is malformed.
        """

    def document_name(self, index: int) -> str:
        """The document's name, the same on every machine and in every run."""
        return f"{self.name}#{index}"


class _WholeFile(TextFile):
    """A plain text file that is one document."""

    def __len__(self) -> int:
        return int(self.num_bytes > 0)

    def text(self, index: int) -> str:
        with naming(lambda: str(self.path)):
            return decode_utf8(_read_bytes(self.path))

    def document_name(self, index: int) -> str:
        return self.name


class _SpanFile(TextFile):
    """A file whose documents are ranges of bytes."""

    def __init__(
        self, path: Path, name: str, find_spans: Callable[[bytes | mmap.mmap], np.ndarray]
    ):
        super().__init__(path, name)
        self._decompressed: bytes | None = None
        if _is_gzip(path):
            self._spans = find_spans(self._gzip_content())
        elif self.num_bytes == 0:
            self._spans = np.zeros((0, 2), np.int64)
        else:
            self._spans = _with_data_error(path, lambda: _scan_mapped(path, find_spans))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decompressed": None}

    def __len__(self) -> int:
        return len(self._spans)

    def _gzip_content(self) -> bytes:
        with _LOAD_LOCK:
            if self._decompressed is None:
                self._decompressed = _read_bytes(self.path)
            return self._decompressed

    def _span(self, start: int, stop: int) -> bytes:
        if _is_gzip(self.path):
            return self._gzip_content()[start:stop]
        return _with_data_error(self.path, lambda: _read_range(self.path, start, stop))

    def text(self, index: int) -> str:
        with naming(lambda: f"{self.path}, document {index}"):
            return decode_utf8(self._span(*self._spans[index].tolist()))


class _JsonLinesFile(_SpanFile):
    """A file with one JSON object per line; blank lines are skipped."""

    def __init__(self, path: Path, name: str, field: str):
        super().__init__(path, name, functools.partial(_find_spans, separator=b"\n"))
        self._field = field

    def text(self, index: int) -> str:
        line = self._span(*self._spans[index].tolist())
        # Lines are counted only for an error message, because that reads the file up to here.
        with naming(lambda: f"{self.path}:{self._line_number(index)}"):
            try:
                return text_of_field(json.loads(decode_utf8(line)), self._field)
            except json.JSONDecodeError as error:
                raise DataError(f"not a line of JSON: {error}") from error

    def _line_number(self, index: int) -> int:
        return self._span(0, int(self._spans[index, 0])).count(b"\n") + 1


class _ParquetFile(TextFile):
    """A file with one document per row."""

    def __init__(self, path: Path, name: str, field: str):
        import pyarrow.parquet

        super().__init__(path, name)
        self._field = field
        self._column: Any = None
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self._num_rows = file.metadata.num_rows
                schema = file.schema_arrow
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"cannot read {path} as parquet: {error}") from error
        if field not in schema.names:
            raise DataError(f"{path}: {_missing_field(field, schema.names)}")
        kind = schema.field(field).type
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            raise DataError(f"{path}: field {field!r} is of type {kind}; the text must be a string")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_column": None}

    def __len__(self) -> int:
        return self._num_rows

    def text(self, index: int) -> str:
        import pyarrow
        import pyarrow.parquet

        with _LOAD_LOCK:
            if self._column is None:
                try:
                    table = pyarrow.parquet.read_table(self.path, columns=[self._field])
                except (OSError, pyarrow.ArrowException) as error:
                    raise DataError(f"cannot read {self.path} as parquet: {error}") from error
                self._column = table.column(self._field)
        try:
            return self._column[index].as_py() or ""
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}, row {index}: not UTF-8: {error}") from error


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs match (`~` and `**` allowed), sorted, without duplicates.

    Raises:
      DataError: a pattern matches nothing, or names a directory.
    """
    found: set[Path] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if os.path.isdir(expanded):
            raise DataError(
                f"{pattern!r} is a directory; name files in it, such as {pattern}/*.txt"
            )
        # An existing path is taken literally, even with glob characters.
        exact = os.path.exists(expanded)
        matches = [expanded] if exact else glob.glob(expanded, recursive=True)
        files = [Path(os.path.abspath(match)) for match in matches if not os.path.isdir(match)]
        if not files:
            raise DataError(f"no file matches {pattern!r} (looked in {os.getcwd()})")
        found.update(files)
    return sorted(found)


def open_files(paths: Sequence[Path], *, text_field: str, separator: str) -> list[TextFile]:
    """Opens files by suffix: .jsonl, .parquet, else plain text; .gz is decompressed.

    A plain file is one document, or several separated by `separator`; blank ones are skipped.

    Raises:
      DataError: a file cannot be read, or lacks `text_field`.
    """
    root = os.path.commonpath([path.parent for path in paths])
    return [
        _open_file(path, Path(os.path.relpath(path, root)), text_field, separator) for path in paths
    ]


def _open_file(path: Path, name: Path, text_field: str, separator: str) -> TextFile:
    suffix = Path(path.stem).suffix if _is_gzip(path) else path.suffix
    if suffix == ".jsonl":
        return _JsonLinesFile(path, name.as_posix(), text_field)
    if suffix == ".parquet" and not _is_gzip(path):
        return _ParquetFile(path, name.as_posix(), text_field)
    if separator:
        split = functools.partial(_find_spans, separator=separator.encode("utf-8"))
        return _SpanFile(path, name.as_posix(), split)
    return _WholeFile(path, name.as_posix())


@contextlib.contextmanager
def naming(where: Callable[[], str]) -> Iterator[None]:
    """Prefixes the message of a `DataError` with `where()`, which is called only on an error."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where()}: {error}") from error


def decode_utf8(content: bytes) -> str:
    """Decodes text.

    Raises:
      DataError: it is not UTF-8; the message names the first bad byte.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); "
            "convert the file or leave it out"
        ) from error


def text_of_field(entry: Any, field: str) -> str:
    """The text in one field of an example; empty for a null.

    Lone surrogates, which JSON can express and UTF-8 cannot, become question marks.

    Raises:
      DataError: the example is not an object, has no such field (its fields are named), or the
        field is not a string.
    """
    if not isinstance(entry, dict):
        raise DataError(f"expected an object with a field {field!r}, got {entry!r:.80}")
    if field not in entry:
        raise DataError(_missing_field(field, list(entry)))
    value = entry[field]
    if isinstance(value, bytes):
        return decode_utf8(value)
    if not isinstance(value, str | None):
        raise DataError(f"field {field!r} is {value!r:.80}; the text must be a string")
    return (value or "").encode("utf-8", errors="replace").decode("utf-8")


def _missing_field(field: str, fields: Sequence[str]) -> str:
    """The message for a missing field."""
    return f"no field {field!r}; there are: {', '.join(fields)} (set data.text_field)"


def _is_gzip(path: Path) -> bool:
    return path.suffix == ".gz"


def _read_bytes(path: Path) -> bytes:
    content = _with_data_error(path, path.read_bytes)
    if not _is_gzip(path):
        return content
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"cannot decompress {path}: {error}") from error


def _with_data_error[T](path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _read_range(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _scan_mapped(
    path: Path, find_spans: Callable[[bytes | mmap.mmap], np.ndarray]
) -> Int64[np.ndarray, "n 2"]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return find_spans(content)


def _find_spans(content: bytes | mmap.mmap, separator: bytes) -> Int64[np.ndarray, "n 2"]:
    spans = [span for span in _split(content, separator) if not _is_blank(content, *span)]
    return np.asarray(spans, dtype=np.int64).reshape(-1, 2)


def _split(content: bytes | mmap.mmap, separator: bytes) -> Iterator[tuple[int, int]]:
    start = 0
    while (stop := content.find(separator, start)) >= 0:
        yield start, stop
        start = stop + len(separator)
    yield start, len(content)


def _is_blank(content: bytes | mmap.mmap, start: int, stop: int) -> bool:
    # The first bytes decide for most documents, without a copy of the whole.
    return not content[start : min(stop, start + 64)].strip() and not content[start:stop].strip()
