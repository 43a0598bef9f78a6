"""Documents in ArrayRecord files without TFDS: one UTF-8 text, or one JSON object, per record."""

import json
import threading
from pathlib import PurePath
from typing import Any

from megalodon_jax.data.contents import Content, MemoryContent
from megalodon_jax.data.text_files import TextFile, text_of_field
from megalodon_jax.errors import DataError
from megalodon_jax.storage.location import AnyPath, is_store

ARRAY_RECORD_SUFFIXES = (".array_record", ".arrayrecord")


def is_array_record(path: PurePath) -> bool:
    """Whether the name is that of an ArrayRecord file or of one of several shards."""
    return path.suffix.partition("-")[0] in ARRAY_RECORD_SUFFIXES


class ArrayRecordFile(TextFile):
    """A file with one document per record.

    A record that is a JSON object has its text in a field; any other record is the text itself.
    """

    def __init__(self, path: AnyPath, name: str, field: str):
        if is_store(path):
            raise DataError(
                f"cannot read {path}: the ArrayRecord library reads files of disks only; copy the "
                "file to a disk, or write .parquet"
            )
        super().__init__(path, name)
        self._field = field
        self._lock = threading.Lock()
        self._reader: Any = None
        with self._lock:
            self._num_records = self._open_reader().num_records()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._num_records

    def open(self, index: int) -> Content:
        with self._lock:
            try:
                (record,) = self._open_reader().read([index])
            except (RuntimeError, IndexError, ValueError) as error:
                raise DataError(f"cannot read the record: {error}") from error
        if not record.lstrip().startswith(b"{"):
            return MemoryContent(record)
        try:
            entry = json.loads(record)
        except (ValueError, RecursionError):
            return MemoryContent(record)
        return MemoryContent(text_of_field(entry, self._field).encode("utf-8"))

    def where(self, index: int) -> str:
        return f"{self.path}, record {index}"

    def _open_reader(self) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        if self._reader is None:
            reader = ArrayRecordReader(str(self.path))
            if not reader.ok():
                raise DataError(f"cannot read {self.path} as array_record: it is damaged or empty")
            self._reader = reader
        return self._reader
