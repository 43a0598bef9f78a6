"""Documents in files: plain text, .jsonl, .parquet and .array_record, compressed or not.

Opening a file finds where its documents are; their bytes are read on access, long ones in pieces.
Memory: 16 bytes per document, and the decompressed bytes of a .gz or .zst file with several
documents (once per process; these are not pickled).
"""

import contextlib
import functools
import json
import threading
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from megalodon_jax.data.compression import is_compressed
from megalodon_jax.data.contents import (
    CompressedContent,
    Content,
    FileContent,
    MemoryContent,
    read_all,
    with_data_error,
)
from megalodon_jax.data.pieces import decode_utf8
from megalodon_jax.errors import DataError
from megalodon_jax.storage.files import open_binary, size_of
from megalodon_jax.storage.location import AnyPath

# One lock for all files: only the first access to a file's content is contended.
_LOAD_LOCK = threading.Lock()
_SCAN_BYTES = 1 << 22
# The field that stands for a whole record, as JSON text.
WHOLE_RECORD = "*"


class Blocks(NamedTuple):
    """Documents that are decoded together.

    Attributes:
      stops: the document after the last one of each block.
      groups: number of each block's group, ascending; the blocks of a group are read in order.
    """

    stops: Int64[np.ndarray, " n"]
    groups: Int64[np.ndarray, " n"]


class TextFile(ABC):
    """The documents of one file.

    Attributes:
      path: the file's path.
      name: the file's name in document names, the same on every machine.
    """

    def __init__(self, path: AnyPath, name: str):
        self.path = path
        self.name = name
        self.num_bytes = with_data_error(path, lambda: size_of(path))

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @abstractmethod
    def open(self, index: int) -> Content:
        """The bytes of one document; none for a null.

        Raises:
          DataError: the file cannot be read, or the document is malformed.
        """

    def where(self, index: int) -> str:
        """The document's place, for messages."""
        return f"{self.path}, document {index}"

    def document_name(self, index: int) -> str:
        """The document's name, the same on every machine and in every run."""
        return f"{self.name}#{index}"

    def blocks(self) -> Blocks | None:
        """The blocks of a file that is decoded in blocks; None: any order is as fast."""
        return None

    def release(self) -> None:  # noqa: B027
        """Frees the memory of what was decoded last."""


class WholeFile(TextFile):
    """A plain text file that is one document."""

    def __len__(self) -> int:
        return int(self.num_bytes > 0)

    def open(self, index: int) -> Content:
        if is_compressed(self.path):
            return CompressedContent(self.path)
        return FileContent(self.path, 0, self.num_bytes)

    def where(self, index: int) -> str:
        return str(self.path)

    def document_name(self, index: int) -> str:
        return self.name


class SpanFile(TextFile):
    """A file whose documents are ranges of bytes between separators; blank ones are skipped."""

    def __init__(self, path: AnyPath, name: str, separator: bytes):
        super().__init__(path, name)
        self._decompressed: bytes | None = None
        if is_compressed(path):
            content = self._decompress()
            self._spans = _find_spans(lambda start: content[start : start + _SCAN_BYTES], separator)
        else:
            with with_data_error(path, lambda: open_binary(path, buffering=0)) as file:
                self._spans = _find_spans(functools.partial(_read_from, path, file), separator)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decompressed": None}

    def __len__(self) -> int:
        return len(self._spans)

    def _decompress(self) -> bytes:
        with _LOAD_LOCK:
            if self._decompressed is None:
                self._decompressed = read_all(CompressedContent(self.path))
            return self._decompressed

    def _open_range(self, start: int, stop: int) -> Content:
        if is_compressed(self.path):
            return MemoryContent(self._decompress()[start:stop])
        return FileContent(self.path, start, stop)

    def open(self, index: int) -> Content:
        return self._open_range(*self._spans[index].tolist())


class JsonLinesFile(SpanFile):
    """A file with one JSON object per line; blank lines are skipped."""

    def __init__(self, path: AnyPath, name: str, field: str):
        super().__init__(path, name, b"\n")
        self._field = field

    def open(self, index: int) -> Content:
        line = decode_utf8(read_all(super().open(index)))
        try:
            entry = json.loads(line)
        # Numbers of more than 4,300 digits and deep nesting have errors of their own.
        except (ValueError, RecursionError) as error:
            raise DataError(f"not a line of JSON: {error}") from error
        return MemoryContent(text_of_field(entry, self._field).encode("utf-8"))

    def where(self, index: int) -> str:
        # Lines are counted only for an error message, because that reads the file up to here.
        before = self._open_range(0, int(self._spans[index, 0]))
        starts = range(0, before.num_bytes(), _SCAN_BYTES)
        lines = sum(before.read(start, _SCAN_BYTES).count(b"\n") for start in starts)
        return f"{self.path}:{lines + 1}"


@contextlib.contextmanager
def naming(where: Callable[[], str]) -> Iterator[None]:
    """Prefixes the message of a `DataError` with `where()`, which is called only on an error."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where()}: {error}") from error


def text_of_field(entry: Any, field: str) -> str:
    """The text in one field of an example; empty for a null; `WHOLE_RECORD`: all as JSON text.

    Lone surrogates, which JSON can express and UTF-8 cannot, become question marks.

    Raises:
      DataError: the example is not an object, has no such field (its fields are named), or the
        field is not a string.
    """
    if field == WHOLE_RECORD:
        return json.dumps(entry)
    if not isinstance(entry, dict):
        raise DataError(f"expected an object with a field {field!r}, got {entry!r:.80}")
    if field not in entry:
        raise DataError(missing_field(field, list(entry)))
    value = entry[field]
    if isinstance(value, bytes):
        return decode_utf8(value)
    if not isinstance(value, str | None):
        raise DataError(f"field {field!r} is {value!r:.80}; the text must be a string")
    return (value or "").encode("utf-8", errors="replace").decode("utf-8")


def missing_field(field: str, fields: Sequence[str]) -> str:
    """The message for a missing field, with the fields that there are."""
    return f"no field {field!r}; there are: {', '.join(fields)} (set data.text_field)"


def _read_from(path: AnyPath, file: IO[bytes], start: int) -> bytes:
    return with_data_error(path, lambda: file.read(_SCAN_BYTES))


def _find_spans(read: Callable[[int], bytes], separator: bytes) -> Int64[np.ndarray, "n 2"]:
    """Ranges of bytes between separators that are not blank.

    Args:
      read: the next bytes of the file, called with the number of those before.
      separator: the separator.
    """
    spans = array("q")
    start = position = 0  # of the document, and of the buffer
    is_blank, rest = True, b""
    while chunk := read(position + len(rest)):
        buffer = rest + chunk
        first = 0
        while (stop := buffer.find(separator, first)) >= 0:
            is_blank = is_blank and _is_blank(buffer, first, stop)
            if not is_blank:
                spans.extend((start, position + stop))
            first = stop + len(separator)
            start, is_blank = position + first, True
        # A separator may go on in the next chunk.
        end = max(first, len(buffer) - len(separator) + 1)
        is_blank = is_blank and _is_blank(buffer, first, end)
        position, rest = position + end, buffer[end:]
    if not (is_blank and _is_blank(rest, 0, len(rest))):
        spans.extend((start, position + len(rest)))
    return (
        np.frombuffer(spans, np.int64).reshape(-1, 2).copy()
        if spans
        else np.zeros((0, 2), np.int64)
    )


def _is_blank(content: bytes, start: int, stop: int) -> bool:
    # The first bytes decide for most documents, without a copy of the whole.
    return not content[start : min(stop, start + 64)].strip() and not content[start:stop].strip()
