"""Files by path, glob and folder, opened by suffix."""

import glob
import os
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePath

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
from megalodon_jax.storage.files import size_of, store_errors
from megalodon_jax.storage.location import (
    AnyPath,
    as_path,
    data_file_system,
    is_store,
    key_of,
    scheme_of,
)

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


def find_files(patterns: Sequence[str]) -> list[AnyPath]:
    """The files that paths, folders, globs and URLs match, sorted, without duplicates.

    `~` and `**` are allowed. A folder stands for the files with `FOLDER_SUFFIXES` in it and in its
    subfolders; those whose names begin with a dot are left out. Files of stores come last.

    Raises:
      DataError: a pattern matches nothing, a folder has no such file, or a store cannot be read.
      ConfigError: a URL's scheme is unknown, or its package is not installed.
    """
    local: set[Path] = set()
    stored: set[str] = set()
    for pattern in patterns:
        if is_store(pattern):
            stored.update(_find_stored(pattern))
            continue
        expanded = os.path.expanduser(pattern)
        if os.path.isdir(expanded):
            local.update(_files_of_folder(expanded))
            continue
        # An existing path is taken literally, even with glob characters.
        exact = os.path.exists(expanded)
        matches = [expanded] if exact else glob.glob(expanded, recursive=True)
        files = [Path(os.path.abspath(match)) for match in matches if not os.path.isdir(match)]
        if not files:
            raise DataError(f"no file matches {pattern!r} (looked in {os.getcwd()})")
        local.update(files)
    # The order of a store's files is that of the same files on a disk.
    return [*sorted(local), *map(as_path, sorted(stored, key=lambda url: PurePath(url).parts))]


def _files_of_folder(folder: str) -> list[Path]:
    found = []
    for directory, subdirectories, names in os.walk(os.path.abspath(folder)):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        paths = (Path(directory, name) for name in names if not name.startswith("."))
        found += [path for path in paths if _is_known(path)]
    if not found:
        raise _nothing_in_folder(folder)
    return found


def _find_stored(pattern: str) -> list[str]:
    """The URLs that a URL, a prefix or a glob matches."""
    scheme = scheme_of(pattern)
    file_system, key = data_file_system(scheme), key_of(pattern)
    try:
        with store_errors():
            # Like on a disk, an existing name is taken literally.
            kind = file_system.info(key)["type"] if file_system.exists(key) else None
            if kind == "directory":
                below = (name.removeprefix(f"{key}/") for name in file_system.find(key))
                names = [
                    f"{key}/{name}"
                    for name in below
                    if _is_known(PurePath(name))
                    and not any(part.startswith(".") for part in name.split("/"))
                ]
            else:
                entries = {} if kind else file_system.glob(key, detail=True)
                names = [key] if kind else [n for n in entries if entries[n]["type"] == "file"]
    except OSError as error:
        raise DataError(f"cannot read {pattern}: {error}") from error
    if not names:
        raise _nothing_in_folder(pattern) if kind else DataError(f"no object matches {pattern!r}")
    return [f"{scheme}://{name}" for name in names]


def _nothing_in_folder(folder: str) -> DataError:
    return DataError(
        f"no file in folder {folder!r} ends in {', '.join(FOLDER_SUFFIXES)} (with or without "
        f"{', '.join(COMPRESSED_SUFFIXES)}); name other files by a glob, such as {folder}/*.py"
    )


def _is_known(path: PurePath) -> bool:
    if is_compressed(path):
        return inner_suffix(path) in (*PLAIN_SUFFIXES, ".jsonl")
    return path.suffix in FOLDER_SUFFIXES or is_array_record(path)


def require_json_lines(files: Sequence[str]) -> None:
    """Raises `DataError` if a file of these names, globs and folders is not .jsonl."""
    other = [
        path for path in (find_files(files) if files else ()) if inner_suffix(path) != ".jsonl"
    ]
    if other:
        raise DataError(
            f"{other[0]} is no .jsonl file; examples are lines of JSON with messages, or with "
            "prompt and response"
        )


def open_files(paths: Sequence[AnyPath], *, text_field: str, separator: str) -> list[TextFile]:
    """Opens files by suffix: .jsonl, .parquet, .array_record, else plain text.

    Plain text and .jsonl may be compressed (.gz, .zst). A plain file is one document, or several
    separated by `separator`; blank ones are skipped.

    Raises:
      DataError: a file cannot be read, or lacks `text_field`.
    """
    # Documents have the same names on a disk and in a store: relative to the common folder.
    absolute = [f"/{scheme_of(path)}/{key_of(path)}" if is_store(path) else path for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [
        _open_file(path, PurePath(os.path.relpath(name, root)), text_field, separator)
        for path, name in zip(paths, absolute, strict=True)
    ]


def _open_file(path: AnyPath, name: PurePath, text_field: str, separator: str) -> TextFile:
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


def _warn_unless_text(path: AnyPath, separator: str) -> None:
    """Warns of a file that is read as plain text although it seems to be something else."""
    start = FileContent(path, 0, min(_SNIFFED_BYTES, size_of(path))).read(0, _SNIFFED_BYTES)
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
