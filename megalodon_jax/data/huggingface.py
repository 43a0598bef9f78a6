"""Data sets of the Hugging Face `datasets` library on disk (extra `hf`); nothing is downloaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from megalodon_jax.config import TextSource
from megalodon_jax.data.contents import Content, MemoryContent
from megalodon_jax.data.sources import Source, digest_of
from megalodon_jax.data.splits import Split, is_held_out
from megalodon_jax.data.text_files import text_of_field
from megalodon_jax.errors import DataError
from megalodon_jax.storage.files import size_of
from megalodon_jax.storage.location import AnyPath, is_store


def open_saved(entry: TextSource) -> Source:
    """Opens a split of a folder that `save_to_disk` wrote.

    Raises:
      DataError: there is no such folder or split, or `datasets` is not installed.
    """
    datasets = _import_datasets(entry)
    if is_store(entry.hf_path):
        raise DataError(
            f"data.hf_path is {entry.hf_path!r}; data sets of save_to_disk are read from disks only"
        )
    path = str(Path(entry.hf_path).expanduser())
    try:
        loaded = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"cannot open the Hugging Face data set {path}: {reason}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if entry.hf_split not in loaded:
            raise DataError(
                f"{path} has no split {entry.hf_split!r}; there are: {', '.join(loaded)} (set "
                "data.hf_split)"
            )
        loaded = loaded[entry.hf_split]
    return _SavedSource(loaded, f"{Path(path).name}/{entry.hf_split}", entry.text_field)


class _SavedSource(Source):
    """A memory-mapped data set."""

    def __init__(self, examples: Any, name: str, field: str):
        self._examples = examples
        self._name = name
        self._field = field

    def __len__(self) -> int:
        return len(self._examples)

    def name(self, index: int) -> str:
        return f"{self._name}#{index}"

    def open(self, index: int) -> Content:
        return MemoryContent(text_of_field(self._examples[index], self._field).encode("utf-8"))

    def fingerprint(self) -> str:
        # The library's own fingerprint differs between saved copies of the same data.
        return digest_of(self._name, len(self), sorted(self._examples.features))


class StreamedSource:
    """Documents of files in their order, read by one of the library's loaders.

    There is no access by index and no shuffling but that of packed rows.
    """

    def __init__(self, entry: TextSource, files: Sequence[AnyPath]):
        self._entry = entry
        self._files = [str(path) for path in files]
        self._sizes = [(path.name, size_of(path)) for path in files]
        self._fraction = 0.0
        self._split: Split = "train"

    def select(self, fraction: float, split: Split) -> Self:
        """Keeps the documents of one split, by the hash of their names."""
        if split == "heldout" and fraction == 0.0:
            raise DataError(
                "nothing is held out: data.heldout_fraction is 0; raise it, or name "
                "data.heldout_files"
            )
        self._fraction, self._split = fraction, split
        return self

    @property
    def field(self) -> str:
        """The field with the text."""
        return self._entry.text_field

    def fingerprint(self) -> str:
        """A hash of the files' names and sizes."""
        return digest_of(self._entry.hf_path, self._entry.hf_split, self._sizes, self._fraction)

    def open_stream(self) -> Any:
        """The library's `IterableDataset`, at its start.

        Raises:
          DataError: the files cannot be read by this loader.
        """
        datasets = _import_datasets(self._entry)
        try:
            return datasets.load_dataset(
                self._entry.hf_path,
                data_files={self._entry.hf_split: self._files},
                split=self._entry.hf_split,
                streaming=True,
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"cannot stream with the Hugging Face loader {self._entry.hf_path!r}: {reason}"
            ) from error

    def is_selected(self, index: int) -> bool:
        """Whether document `index` belongs to this split."""
        held_out = is_held_out(self.name(index), self._fraction)
        return held_out == (self._split == "heldout")

    def name(self, index: int) -> str:
        """The name of document `index`."""
        return f"{self._entry.hf_path}/{self._entry.hf_split}#{index}"


def _import_datasets(entry: TextSource) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data.hf_path is {entry.hf_path!r} but the library `datasets` is not installed; "
            "install megalodon-flax[hf]"
        ) from error
    return datasets
