"""Documents in .parquet files: blocks of rows are decoded one at a time."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from megalodon_jax.data.contents import Content, MemoryContent
from megalodon_jax.data.text_files import Blocks, TextFile, missing_field
from megalodon_jax.errors import DataError, one_line
from megalodon_jax.storage.files import errors_of, open_binary
from megalodon_jax.storage.location import AnyPath, is_store

# Text bytes of a block. A smaller row group is one block.
BLOCK_BYTES = 1 << 24


class ParquetFile(TextFile):
    """A file with one document per row.

    A block of rows is kept decoded, that of the last document. The blocks of a row group must be
    decoded in order, so reading backward in a long row group decodes it from its start.
    """

    def __init__(self, path: AnyPath, name: str, field: str):
        import pyarrow.parquet

        super().__init__(path, name)
        self._field = field
        self._lock = threading.Lock()
        self._reader: _BlockReader | None = None
        try:
            with errors_of(path), _opened(path) as file:
                schema = file.schema_arrow
                if field not in schema.names:
                    raise DataError(f"{path}: {missing_field(field, schema.names)}")
                self._blocks = _find_blocks(file, field)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"cannot read {path} as parquet: {one_line(error)}") from error
        kind = schema.field(field).type
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            raise DataError(f"{path}: field {field!r} is of type {kind}; the text must be a string")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        stops = self._blocks.stops
        return int(stops[-1]) if len(stops) else 0

    def blocks(self) -> Blocks:
        return self._blocks

    def open(self, index: int) -> Content:
        import pyarrow

        stops = self._blocks.stops
        block = int(np.searchsorted(stops, index, side="right"))
        start = int(stops[block - 1]) if block else 0
        with self._lock:
            try:
                with errors_of(self.path):
                    text = self._read_block(block)[index - start].as_py()
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"cannot read as parquet: {one_line(error)}") from error
            except UnicodeDecodeError as error:
                raise DataError(f"not UTF-8: {error}") from error
        return MemoryContent((text or "").encode("utf-8"))

    def where(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def release(self) -> None:
        with self._lock:
            self._reader = None

    def _read_block(self, block: int) -> Any:
        stops, groups = self._blocks
        row_group = int(groups[block])
        first, last = (int(np.searchsorted(groups, row_group, side)) for side in ("left", "right"))
        if self._reader is None or not self._reader.can_reach(row_group, block - first):
            sizes = np.diff(stops, prepend=0)[first:last]
            self._reader = _BlockReader(self.path, self._field, row_group, int(sizes.max()))
        return self._reader.read(block - first)


class _BlockReader:
    """The blocks of one row group, forward."""

    def __init__(self, path: AnyPath, field: str, row_group: int, num_rows: int):
        self.row_group = row_group
        self._number = -1
        self._column: Any = None
        self._blocks = _iterate(path, field, row_group, num_rows)

    def can_reach(self, row_group: int, number: int) -> bool:
        return self.row_group == row_group and number >= self._number

    def read(self, number: int) -> Any:
        while self._number < number:
            # Not two blocks at a time.
            self._column = None
            self._column = next(self._blocks)
            self._number += 1
        return self._column


@contextlib.contextmanager
def _opened(path: AnyPath, **settings: Any) -> Iterator[Any]:
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_binary(path)) if is_store(path) else path
        yield stack.enter_context(pyarrow.parquet.ParquetFile(source, **settings))


def _iterate(path: AnyPath, field: str, row_group: int, num_rows: int) -> Iterator[Any]:
    with _opened(path, buffer_size=1 << 20, pre_buffer=False) as file:
        batches = file.iter_batches(
            batch_size=num_rows, row_groups=[row_group], columns=[field], use_threads=False
        )
        for batch in batches:
            yield batch.column(0)


def _find_blocks(file: Any, field: str) -> Blocks:
    """The blocks of all row groups.

    All blocks of a row group but the last have the same number of rows.
    """
    groups, stops = [], []
    first = 0
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        columns = (group.column(i) for i in range(group.num_columns))
        num_bytes = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field)
        num_blocks = max(1, -(-num_bytes // BLOCK_BYTES))
        size = max(1, -(-group.num_rows // num_blocks))
        for start in range(0, group.num_rows, size):
            groups.append(index)
            stops.append(first + min(start + size, group.num_rows))
        first += group.num_rows
    return Blocks(np.asarray(stops, np.int64), np.asarray(groups, np.int64))
