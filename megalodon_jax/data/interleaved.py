"""Rows of several documents in turn: consecutive rows do not all come from one long document."""

from typing import Any

import numpy as np

from megalodon_jax.data.documents import Documents
from megalodon_jax.data.packing import Row, RowBuilder
from megalodon_jax.data.reader import ReadOptions, RowReader

# Documents that are read side by side. Book after book, a row of 2,048 bytes and 64 rows a batch,
# 15 consecutive batches came from one novel; the loss of the next one was a spike.
NUM_READERS = 16


class InterleavedReader:
    """Rows of one source, read by several readers in turn; each takes the next unread document.

    A row has documents of one reader. At the end of an epoch, where there is no next document, the
    row goes on with those of the other readers: only the last row of an epoch is padded.

    Args:
      documents: the documents, in order.
      options: how to read them.
      source: number of the source.
      num_readers: documents that are read side by side.
    """

    def __init__(
        self,
        documents: Documents,
        options: ReadOptions,
        *,
        source: int,
        num_readers: int = NUM_READERS,
    ):
        self._documents = documents
        self._options = options
        self._source = source
        self._dtype = np.min_scalar_type(options.tokenizer.vocab_size - 1)
        self._make_readers(num_readers)

    def _make_readers(self, number: int) -> None:
        self._readers = [
            RowReader(self._documents, self._options, source=self._source) for _ in range(number)
        ]
        self._turn = 0

    def position(self) -> dict[str, Any]:
        """The position as JSON values."""
        return {
            "documents": self._documents.position(),
            "readers": [reader.position() for reader in self._readers],
            "turn": self._turn,
        }

    def move_to(self, position: dict[str, Any]) -> None:
        """Moves to a saved position, with its number of readers.

        Raises:
          DataError: a document there cannot be read.
        """
        # Older versions had one reader, whose position is the whole.
        saved = position.get("readers", [position])
        if len(saved) != len(self._readers):
            self._make_readers(len(saved))
        for reader, place in zip(self._readers, saved, strict=True):
            reader.move_to(place)
        self._turn = position.get("turn", 0)
        # Last: a reader that opens its document again moves the position of the unread ones.
        if "readers" in position:
            self._documents.move_to(position["documents"])

    def next_epoch(self) -> int | None:
        """The epoch of the next row; None at the end of the data."""
        epochs = self._open_epochs()
        return min(epochs) if epochs else self._readers[self._turn].next_epoch()

    def next_row(self, epoch: int) -> Row:
        """The next row; with packing `pad` it holds tokens of one document only."""
        row = RowBuilder(self._options.seq_len, self._dtype)
        for _ in self._readers:
            reader = self._readers[self._turn]
            self._turn = (self._turn + 1) % len(self._readers)
            # A reader that holds a document of the next epoch shows that this one has no more.
            is_open = reader.open_epoch() is not None
            if not is_open and any(other > epoch for other in self._open_epochs()):
                continue
            if reader.fill(row, epoch) or (self._options.packing == "pad" and row.num_filled):
                break
        bad_documents = sum(reader.take_bad_documents() for reader in self._readers)
        return row.build(source=self._source, bad_documents=bad_documents)

    def _open_epochs(self) -> list[int]:
        epochs = (reader.open_epoch() for reader in self._readers)
        return [epoch for epoch in epochs if epoch is not None]
