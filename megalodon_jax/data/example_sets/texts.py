"""Labelled texts as bytes: folders of files, .jsonl lines, and pairs of texts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megalodon_jax.data.labelled import ExampleSet, LabelledExample
from megalodon_jax.data.sources import digest_of
from megalodon_jax.data.splits import is_held_out
from megalodon_jax.errors import DataError

# Ids: the bytes, then the end of the document.
EOS, VOCAB_SIZE = 256, 257


class LabelledFile(NamedTuple):
    """A file, or a line of one, and its class.

    Attributes:
      name: the same on every machine.
      path: the file.
      label: number of the class.
      texts: the texts of a line; None: the content of the file.
    """

    name: str
    path: Path
    label: int
    texts: tuple[str, ...] | None = None


class TextExamples(ExampleSet):
    """Documents of bytes; two of a pair."""

    def __init__(self, files: Sequence[LabelledFile], classes: tuple[str, ...]):
        self._files, self.classes = files, classes

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index].name

    def example(self, index: int) -> LabelledExample:
        file = self._files[index]
        try:
            contents = (
                [file.path.read_bytes()]
                if file.texts is None
                else [text.encode("utf-8", errors="replace") for text in file.texts]
            )
        except OSError as error:
            raise DataError(f"cannot read {file.path}: {error}") from error
        return LabelledExample(tuple(map(byte_document, contents)), file.label)

    def fingerprint(self) -> str:
        return digest_of(*((file.name, file.label) for file in self._files))


def byte_document(content: bytes) -> np.ndarray:
    """The bytes of a text and eos."""
    return np.concatenate([np.frombuffer(content, np.uint8), [EOS]]).astype(np.uint16)


def find_labelled_files(
    path: str, classes: tuple[str, ...], *, suffixes: tuple[str, ...] = ()
) -> tuple[list[LabelledFile], tuple[str, ...]]:
    """The files of a folder with one folder for each class, in order of their names.

    Args:
      path: the folder.
      classes: names of the classes; a folder belongs to the one whose name its own contains. Empty:
        every folder is a class.
      suffixes: of the files; empty: all files.

    Raises:
      DataError: there is no such folder, or a folder or class has no counterpart.
    """
    root = Path(path)
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    if not folders:
        raise DataError(
            f"{path or 'examples.path'} has no folders; give a folder with one folder of files "
            "for each class"
        )
    names = classes or tuple(folder.name for folder in folders)
    found: list[LabelledFile] = []
    for folder in folders:
        labels = [n for n, name in enumerate(names) if name.lower() in folder.name.lower()]
        if classes and len(labels) != 1:
            raise DataError(
                f"folder {folder} belongs to {len(labels)} of the classes {', '.join(names)}; its "
                "name must contain the name of one of them (examples.classes)"
            )
        label = labels[0] if classes else names.index(folder.name)
        files = sorted(entry for entry in folder.rglob("*") if entry.is_file())
        found += [
            LabelledFile(file.relative_to(root).as_posix(), file, label)
            for file in files
            if not suffixes or file.suffix.lower() in suffixes
        ]
    if missing := [name for n, name in enumerate(names) if all(f.label != n for f in found)]:
        raise DataError(f"{path} has no file of class {', '.join(missing)}")
    return found, names


def read_labelled_lines(
    path: str, classes: tuple[str, ...], *, fields: tuple[str, ...]
) -> tuple[list[LabelledFile], tuple[str, ...]]:
    """The lines {"text": ..., "label": ...} of a .jsonl file; `fields` are those of the texts.

    Raises:
      DataError: the file cannot be read, or a line has another form or an unknown label.
    """
    records: list[tuple[tuple[str, ...], str]] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            texts = tuple(record[field] for field in fields)
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a text is no text")
            records.append((texts, str(record["label"])))
        except (ValueError, KeyError, TypeError) as error:
            needed = ", ".join((*fields, "label"))
            raise DataError(f"{path}, line {number}: needs {needed}; {error}") from error
    names = classes or tuple(sorted({label for _, label in records}))
    if unknown := sorted({label for _, label in records} - set(names)):
        raise DataError(f"{path} has labels {', '.join(unknown)}; examples.classes lacks them")
    name = Path(path).name
    return [
        LabelledFile(f"{name}#{i}", Path(path), names.index(label), texts)
        for i, (texts, label) in enumerate(records)
    ], names


def split_files(
    files: Sequence[LabelledFile], fraction: float, *, by_order: bool
) -> dict[str, list[LabelledFile]]:
    """Training and held-out files.

    Args:
      files: all of them, in order of their names.
      fraction: held out.
      by_order: the last files of every folder are held out; else those of a hash of the names.

    Raises:
      DataError: nothing is left for a part.
    """
    if by_order:
        groups: dict[str, list[LabelledFile]] = {}
        for file in files:
            group = str(file.label) if file.texts else file.name.rpartition("/")[0]
            groups.setdefault(group, []).append(file)
        heldout = {
            file.name
            for group in groups.values()
            for file in group[len(group) - round(len(group) * fraction) :]
        }
    else:
        heldout = {file.name for file in files if is_held_out(file.name, fraction)}
    parts = {
        "train": [file for file in files if file.name not in heldout],
        "heldout": [file for file in files if file.name in heldout],
    }
    if not all(parts.values()):
        raise DataError(
            f"data.heldout_fraction {fraction} leaves {len(parts['train'])} training and "
            f"{len(parts['heldout'])} held-out files of {len(files)}; name examples.heldout_path"
        )
    return parts
