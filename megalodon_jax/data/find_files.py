"""Files by path, glob and folder, opened by suffix."""

import glob
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from megalodon_jax.data.array_record_files import (
    ARRAY_RECORD_SUFFIXES,
    ArrayRecordFile,
    is_array_record,
)
from megalodon_jax.data.compression import COMPRESSED_SUFFIXES, inner_suffix, is_compressed
from megalodon_jax.data.contents import FileContent
from megalodon_jax.data.parquet_files import ParquetFile
from megalodon_jax.data.text_files import JsonLinesFile, SpanFile, TextFile, WholeFile
from megalodon_jax.errors import DataError
from megalodon_jax.file_limits import FileLimitError, check_regular

# Files that are read in a folder; .gz and .zst may follow those of plain text and .jsonl.
PLAIN_SUFFIXES = (".txt", ".text", ".md", ".rst")
FOLDER_SUFFIXES = (*PLAIN_SUFFIXES, ".jsonl", ".parquet", *ARRAY_RECORD_SUFFIXES)
_SNIFFED_BYTES = 1 << 12


# First bytes of formats that are not text.
_MAGIC = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip", b"%PDF": "PDF", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG",
    b"PAR1": "parquet", b"\x7fELF": "ELF", b"ARROW1": "Arrow", b"\x80\x04": "pickle",
}  # fmt: skip


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, folders and globs match, sorted, without duplicates.

    `~` and `**` are allowed. A folder stands for the files with `FOLDER_SUFFIXES` in it and in its
    subfolders; those whose names begin with a dot are left out.

    Raises:
      DataError: a pattern matches nothing, or a folder has no such file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if os.path.isdir(expanded):
            found.update(_files_of_folder(expanded))
            continue
        # An existing path is taken literally, even with glob characters.
        exact = os.path.exists(expanded)
        matches = [expanded] if exact else glob.glob(expanded, recursive=True)
        files = [Path(os.path.abspath(match)) for match in matches if not os.path.isdir(match)]
        if not files:
            raise DataError(f"no file matches {pattern!r} (looked in {os.getcwd()})")
        found.update(files)
    return sorted(found)


def _files_of_folder(folder: str) -> list[Path]:
    found = []
    for directory, subdirectories, names in os.walk(os.path.abspath(folder)):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        paths = (Path(directory, name) for name in names if not name.startswith("."))
        found += [path for path in paths if _is_known(path)]
    if not found:
        raise DataError(
            f"no file in folder {folder!r} ends in {', '.join(FOLDER_SUFFIXES)} (with or without "
            f"{', '.join(COMPRESSED_SUFFIXES)}); name other files by a glob, such as {folder}/*.py"
        )
    return found


def _is_known(path: Path) -> bool:
    if is_compressed(path):
        return inner_suffix(path) in (*PLAIN_SUFFIXES, ".jsonl")
    return path.suffix in FOLDER_SUFFIXES or is_array_record(path)


def open_files(paths: Sequence[Path], *, text_field: str, separator: str) -> list[TextFile]:
    """Opens files by suffix: .jsonl, .parquet, .array_record, else plain text.

    Plain text and .jsonl may be compressed (.gz, .zst). A plain file is one document, or several
    separated by `separator`; blank ones are skipped.

    Raises:
      DataError: a file cannot be read, or lacks `text_field`.
    """
    root = os.path.commonpath([path.parent for path in paths])
    return [
        _open_file(path, Path(os.path.relpath(path, root)), text_field, separator) for path in paths
    ]


def _open_file(path: Path, name: Path, text_field: str, separator: str) -> TextFile:
    try:
        check_regular(path)
    except (FileLimitError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    suffix = inner_suffix(path)
    if suffix == ".jsonl":
        return JsonLinesFile(path, name.as_posix(), text_field)
    if suffix == ".parquet" and not is_compressed(path):
        return ParquetFile(path, name.as_posix(), text_field)
    if is_array_record(path):
        return ArrayRecordFile(path, name.as_posix(), text_field)
    if not is_compressed(path):
        _warn_unless_text(path, separator)
    if separator:
        return SpanFile(path, name.as_posix(), separator.encode("utf-8"))
    return WholeFile(path, name.as_posix())


def _warn_unless_text(path: Path, separator: str) -> None:
    """Warns of a file that is read as plain text although it seems to be something else."""
    start = FileContent(path, 0, min(_SNIFFED_BYTES, path.stat().st_size)).read(0, _SNIFFED_BYTES)
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    if path.suffix == ".json" and start.lstrip()[:1] in (b"[", b"{"):
        problem = (
            "JSON with its brackets and keys is read as plain text; write one object per line "
            "into a .jsonl file"
        )
    elif kind is not None:
        problem = f"it begins like a {kind} file but is read as plain text; give it its suffix"
    elif b"\0" in start and "\0" not in separator:
        problem = (
            "plain text with NUL bytes; if they separate documents, set data.document_separator "
            'to "\\u0000"'
        )
    else:
        return
    warnings.warn(f"{path}: {problem}", stacklevel=2)
