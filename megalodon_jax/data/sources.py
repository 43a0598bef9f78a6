"""Document sources: the Python standard library, files, or a prepared TFDS data set.

A source is a sequence of documents in a fixed order with access by index.
"""

import hashlib
import io
import os
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from megalodon_jax.config import TextSource
from megalodon_jax.data.contents import Content, MemoryContent, read_all, with_data_error
from megalodon_jax.data.pieces import decode_utf8
from megalodon_jax.data.text_files import Blocks, TextFile, naming, text_of_field
from megalodon_jax.errors import DataError


class Document(NamedTuple):
    """A text and its name, which is the same on every machine."""

    name: str
    text: str


class Source(ABC):
    """A sequence of documents, read on access; thread-safe."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of document `index`, without reading its text."""

    @abstractmethod
    def open(self, index: int) -> Content:
        """The UTF-8 bytes of document `index`.

        Raises:
          DataError: it cannot be read or is malformed; `where` tells which it is.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the documents' names and sizes."""

    @property
    def repeats(self) -> int:
        """Times that a document follows itself in the order of training."""
        return 1

    def open_visit(self, index: int, visit: int) -> Content:
        """`open` for a place in the order of training, from which augmentations draw.

        Args:
          index: of the document.
          visit: number of the place, counted over all epochs.
        """
        del visit
        return self.open(index)

    def names(self) -> Iterator[str]:
        """The names of all documents."""
        return (self.name(index) for index in range(len(self)))

    def where(self, index: int) -> str:
        """The place of document `index`, for messages."""
        return self.name(index)

    def blocks(self) -> Blocks | None:
        """Documents that are decoded together; None: any order is as fast."""
        return None

    def text(self, index: int) -> str:
        """The text of document `index`.

        Raises:
          DataError: it cannot be read, is malformed or not UTF-8; the message names it.
        """
        with naming(lambda: self.where(index)):
            return decode_utf8(read_all(self.open(index)))

    def __getitem__(self, index: SupportsIndex) -> Document:
        position = range(len(self))[index]
        return Document(self.name(position), self.text(position))

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


class StdlibSource(Source):
    """The .py files of the running Python's standard library.

    Installed packages, tests (they differ between distributions) and generated build settings are
    excluded. Bytes that do not decode in a file's declared encoding are dropped.
    """

    _SKIPPED_DIRS = frozenset(
        {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    )

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        found: dict[str, int] = {}
        for directory, subdirectories, files in os.walk(self._root):
            subdirectories[:] = [name for name in subdirectories if name not in self._SKIPPED_DIRS]
            for name in files:
                path = Path(directory, name)
                if path.suffix == ".py" and not name.startswith("_sysconfigdata"):
                    found[path.relative_to(self._root).as_posix()] = path.stat().st_size
        self._sizes = {name: found[name] for name in sorted(found) if found[name] > 0}
        self._names = list(self._sizes)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def open(self, index: int) -> Content:
        path = self._root / self._names[index]
        content = with_data_error(path, path.read_bytes)
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        except SyntaxError:
            encoding = "utf-8"
        with io.TextIOWrapper(io.BytesIO(content), encoding=encoding, errors="ignore") as reader:
            return MemoryContent(reader.read().encode("utf-8"))

    def fingerprint(self) -> str:
        return digest_of(*self._sizes.items())


class FileSource(Source):
    """The documents of several files, in the order of the files."""

    def __init__(self, files: Sequence[TextFile]):
        self._files = files
        self._stops = np.cumsum([len(file) for file in files])
        self._last_read: TextFile | None = None

    def __len__(self) -> int:
        return int(self._stops[-1])

    def _locate(self, index: int) -> tuple[TextFile, int]:
        file_index = int(np.searchsorted(self._stops, index, side="right"))
        file = self._files[file_index]
        return file, index - int(self._stops[file_index]) + len(file)

    def name(self, index: int) -> str:
        file, position = self._locate(index)
        return file.document_name(position)

    def names(self) -> Iterator[str]:
        return (file.document_name(i) for file in self._files for i in range(len(file)))

    def open(self, index: int) -> Content:
        file, position = self._locate(index)
        if self._last_read is not None and self._last_read is not file:
            # One decoded block at a time.
            self._last_read.release()
        self._last_read = file
        return file.open(position)

    def where(self, index: int) -> str:
        file, position = self._locate(index)
        return file.where(position)

    def blocks(self) -> Blocks | None:
        found = [file.blocks() for file in self._files]
        if not any(found):
            return None
        stops, groups = [], []
        start = group = 0
        for file, blocks in zip(self._files, found, strict=True):
            if len(file):
                one = Blocks(np.asarray([len(file)]), np.zeros(1, np.int64))
                file_stops, file_groups = blocks or one
                stops.append(start + file_stops)
                groups.append(group + file_groups)
                start, group = start + len(file), group + int(file_groups[-1]) + 1
        return Blocks(np.concatenate(stops), np.concatenate(groups))

    def fingerprint(self) -> str:
        return digest_of(*((file.name, file.num_bytes, len(file)) for file in self._files))


class TfdsSource(Source):
    """A split of a TFDS data set that was prepared as array_record files."""

    def __init__(self, config: TextSource, split: str):
        import tensorflow_datasets as tfds

        self._split = split
        self._dataset_name = config.tfds_name
        self._field = config.text_field
        directory = config.tfds_dir or None
        where = f"TFDS data set {config.tfds_name!r}, split {self._split!r}"
        try:
            self._examples: Any = tfds.data_source(
                config.tfds_name, split=self._split, data_dir=directory, download=False
            )
        except (ValueError, KeyError, OSError, RuntimeError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"cannot open {where} in {directory or 'the default directory'}: {reason} "
                f"Prepare it first: tfds.builder({config.tfds_name!r}, data_dir={directory!r}, "
                "file_format='array_record').download_and_prepare()"
            ) from error

    def __len__(self) -> int:
        return len(self._examples)

    def name(self, index: int) -> str:
        return f"{self._dataset_name}/{self._split}#{index}"

    def open(self, index: int) -> Content:
        return MemoryContent(text_of_field(self._examples[index], self._field).encode("utf-8"))

    def fingerprint(self) -> str:
        return digest_of(self._dataset_name, self._split, len(self))


def digest_of(*values: Any) -> str:
    """A hash of values that have the same text on every machine."""
    return hashlib.sha256(repr(values).encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
