"""Batches whose rows continue those of the batch before (`data.carry_state`), read with grain.

Every row of a batch is a stream of documents. A document that is longer than the row goes on in the
same row of the next batch; after its end the next unread document follows in the same row, so that
rows have no padding. The row that needs a document first gets it: an epoch has every document once.
"""

import functools
import json
from typing import Any

import grain

from megalodon_jax.data.documents import Slice, open_documents
from megalodon_jax.data.huggingface import StreamedSource
from megalodon_jax.data.packing import PackedRows, collate
from megalodon_jax.data.reader import ReadOptions, RowReader
from megalodon_jax.data.sources import Source


class StreamDataset(grain.IterDataset[PackedRows]):
    """Endless batches whose rows are streams of documents.

    Args:
      source: the documents.
      options: how documents are read, with `carry_state`.
      num_rows: rows of a batch.
      seed: seed of the order of documents.
      part: the documents that this reader gets.
      state: where to start, from `PackedRows.state`; None: at the first batch.
    """

    def __init__(
        self,
        source: Source | StreamedSource,
        options: ReadOptions,
        *,
        num_rows: int,
        seed: int,
        part: Slice,
        state: str | None,
    ):
        super().__init__()
        self._make = functools.partial(
            _StreamIterator, source, options, num_rows=num_rows, seed=seed, part=part
        )
        self._state = state

    def __iter__(self) -> "_StreamIterator":
        iterator = self._make()
        if self._state is not None:
            iterator.set_state({"state": self._state})
        return iterator


class _StreamIterator(grain.DatasetIterator[PackedRows]):
    """Yields batches; its state is the position of every row and that of the unread documents."""

    def __init__(
        self,
        source: Source | StreamedSource,
        options: ReadOptions,
        *,
        num_rows: int,
        seed: int,
        part: Slice,
    ):
        super().__init__()
        self._documents = open_documents(source, seed=seed, epochs=0, part=part)
        self._rows = [RowReader(self._documents, options, source=0) for _ in range(num_rows)]

    def __next__(self) -> PackedRows:
        rows = [row.next_row(None) for row in self._rows]
        state = self.get_state()["state"]
        return collate(rows, num_rows=len(rows), num_sources=1, state=state)

    def get_state(self) -> dict[str, Any]:
        state = {
            "documents": self._documents.position(),
            "rows": [row.position() for row in self._rows],
        }
        return {"state": json.dumps(state)}

    def set_state(self, state: dict[str, Any]) -> None:
        values = json.loads(state["state"])
        for row, saved in zip(self._rows, values["rows"], strict=True):
            row.move_to(saved)
        # Last: a row that opens its document again moves the position of the unread ones.
        self._documents.move_to(values["documents"])
