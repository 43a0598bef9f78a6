"""Document sources: the Python standard library, files, or a prepared TFDS data set.

A source is a sequence of documents in a fixed order with access by index. Training and held-out
documents never overlap. Without held-out files (or a TFDS split), a document is held out if the
hash of its name is below `heldout_fraction`. If that leaves a split without documents (for example
with a single file), the last `heldout_fraction` of every document's characters is held out instead.
"""

import hashlib
import io
import os
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int64

from megalodon_jax.config import DataConfig
from megalodon_jax.data.text_files import TextFile, find_files, naming, open_files, text_of_field
from megalodon_jax.errors import DataError

Split = Literal["train", "heldout"]


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
    def text(self, index: int) -> str:
        """The text of document `index`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the documents' names and sizes."""

    def __getitem__(self, index: SupportsIndex) -> Document:
        position = range(len(self))[index]
        return Document(self.name(position), self.text(position))

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


def open_source(config: DataConfig, split: Split) -> Source:
    """Opens one split of the configured data.

    Raises:
      DataError: a file is missing or malformed, a TFDS data set is not prepared, or the split has
        no document.
    """
    if split not in ("train", "heldout"):
        raise DataError(f"split is {split!r}; use 'train' or 'heldout'")
    if config.source == "tfds":
        source: Source = _TfdsSource(config, split)
    elif config.source == "files" and config.heldout_files:
        source = _open_separate_files(config, split)
    else:
        whole = _StdlibSource() if config.source == "python_stdlib" else _open_files(config)
        _require_documents(whole, config, split)
        source = _select_split(whole, config.heldout_fraction, split)
    _require_documents(source, config, split)
    return source


def _require_documents(source: Source, config: DataConfig, split: Split) -> None:
    if len(source) == 0:
        named = {
            "files": config.heldout_files if split == "heldout" else (),
            "tfds": config.tfds_name,
        }
        where = named.get(config.source) or config.files or config.source
        raise DataError(f"no document for split {split!r}: {where} is empty; name files with text")


class _StdlibSource(Source):
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

    def text(self, index: int) -> str:
        path = self._root / self._names[index]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        except SyntaxError:
            encoding = "utf-8"
        with io.TextIOWrapper(io.BytesIO(content), encoding=encoding, errors="ignore") as reader:
            return reader.read()

    def fingerprint(self) -> str:
        return _digest(*self._sizes.items())


class _FileSource(Source):
    """The documents of several files, in the order of the files."""

    def __init__(self, files: Sequence[TextFile]):
        self._files = files
        self._stops = np.cumsum([len(file) for file in files])

    def __len__(self) -> int:
        return int(self._stops[-1])

    def _locate(self, index: int) -> tuple[TextFile, int]:
        file_index = int(np.searchsorted(self._stops, index, side="right"))
        file = self._files[file_index]
        return file, index - int(self._stops[file_index]) + len(file)

    def name(self, index: int) -> str:
        file, position = self._locate(index)
        return file.document_name(position)

    def text(self, index: int) -> str:
        file, position = self._locate(index)
        return file.text(position)

    def fingerprint(self) -> str:
        return _digest(*((file.name, file.num_bytes, len(file)) for file in self._files))


class _TfdsSource(Source):
    """A split of a TFDS data set that was prepared as array_record files."""

    def __init__(self, config: DataConfig, split: Split):
        import tensorflow_datasets as tfds

        self._split = config.tfds_split if split == "train" else config.tfds_heldout_split
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

    def text(self, index: int) -> str:
        with naming(lambda: self.name(index)):
            return text_of_field(self._examples[index], self._field)

    def fingerprint(self) -> str:
        return _digest(self._dataset_name, self._split, len(self))


class _Selection(Source):
    """A subset of another source's documents."""

    def __init__(self, whole: Source, indices: Int64[np.ndarray, " n"]):
        self._whole = whole
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._whole.name(int(self._indices[index]))

    def text(self, index: int) -> str:
        return self._whole.text(int(self._indices[index]))

    def fingerprint(self) -> str:
        return _digest(self._whole.fingerprint(), self._indices.tolist())


class _TextSlice(Source):
    """The last `fraction` of every document's characters (held out), or the rest (training)."""

    def __init__(self, whole: Source, fraction: float, split: Split):
        self._whole = whole
        self._fraction = fraction
        self._split = split

    def __len__(self) -> int:
        return len(self._whole)

    def name(self, index: int) -> str:
        return f"{self._whole.name(index)} ({'start' if self._split == 'train' else 'end'})"

    def text(self, index: int) -> str:
        text = self._whole.text(index)
        num_heldout = min(max(1, round(len(text) * self._fraction)), max(0, len(text) - 1))
        cut = len(text) - num_heldout
        return text[:cut] if self._split == "train" else text[cut:]

    def fingerprint(self) -> str:
        return _digest(self._whole.fingerprint(), self._fraction, self._split)


def _open_files(config: DataConfig) -> Source:
    return _file_source(find_files(config.files), config)


def _open_separate_files(config: DataConfig, split: Split) -> Source:
    heldout = find_files(config.heldout_files)
    if split == "heldout":
        return _file_source(heldout, config)
    # A glob of training files may match the held-out files too.
    training = [path for path in find_files(config.files) if path not in set(heldout)]
    if not training:
        raise DataError(
            f"every file of data.files {config.files} is in data.heldout_files too; name other "
            "training files"
        )
    return _file_source(training, config)


def _file_source(paths: Sequence[Path], config: DataConfig) -> Source:
    return _FileSource(
        open_files(paths, text_field=config.text_field, separator=config.document_separator)
    )


def _select_split(whole: Source, fraction: float, split: Split) -> Source:
    if fraction == 0.0:
        if split == "heldout":
            raise DataError(
                "nothing is held out: data.heldout_fraction is 0; raise it, or name "
                "data.heldout_files"
            )
        return whole
    hashes = np.asarray([_unit_hash(whole.name(index)) for index in range(len(whole))])
    heldout = hashes < fraction
    if heldout.all() or not heldout.any():
        return _TextSlice(whole, fraction, split)
    return _Selection(whole, np.flatnonzero(heldout == (split == "heldout")))


def _unit_hash(name: str) -> float:
    # Python's built-in hash differs between processes.
    digest = hashlib.blake2b(name.encode("utf-8", errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
