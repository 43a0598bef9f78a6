"""Packing of token documents into rows and batches, in numpy.

A document is the stream bos + tokens + eos. Its inputs are the stream without the last token, its
targets the stream without the first, so every token and eos is a target exactly once. A stream that
does not fit into a row is cut: the rest is a new segment in a later row, and its first input is the
last target before the cut.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from megalodon_jax.data.sources import Document
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.typing import Batch


class TokenDocument(NamedTuple):
    """A tokenized document.

    Attributes:
      stream: bos, tokens, eos.
      num_bytes: text bytes that each target `stream[1:]` encodes; 0 if not counted.
      epoch: number of the pass over the data, from 0.
    """

    stream: Int32[np.ndarray, " n"]
    num_bytes: Int32[np.ndarray, " n-1"]
    epoch: int


class Row(NamedTuple):
    """One row of a batch (see `Batch`), and the text bytes that its targets encode."""

    tokens: Int32[np.ndarray, " L"]
    targets: Int32[np.ndarray, " L"]
    segment_ids: Int32[np.ndarray, " L"]
    num_bytes: int


class CountedBatch(NamedTuple):
    """A batch, and the text bytes that its weighted targets encode.

    Where the batch holds only one process's rows, the bytes are those of the global batch.
    """

    batch: Batch
    num_bytes: int


def tokenize_document(
    document: Document, tokenizer: Tokenizer, *, epoch: int, count_bytes: bool
) -> TokenDocument | None:
    """Tokenizes a document and adds bos and eos; None if it has no token.

    eos encodes no text, except for text that the tokenizer skipped after the last token.
    """
    if count_bytes:
        ids, num_bytes, num_tail_bytes = tokenizer.encode_counted(document.text)
    else:
        ids, num_tail_bytes = tokenizer.encode(document.text), 0
        num_bytes = np.zeros_like(ids)
    if len(ids) == 0:
        return None
    stream = np.empty(len(ids) + 2, np.int32)
    stream[0], stream[1:-1], stream[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
    return TokenDocument(stream, np.append(num_bytes, np.int32(num_tail_bytes)), epoch)


class RowBuilder:
    """A row that is filled from the left; the rest is padding."""

    def __init__(self, seq_len: int):
        self._tokens, self._targets, self._segment_ids = np.zeros((3, seq_len), np.int32)
        self._num_filled = 0
        self._num_segments = 0
        self._num_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether no more tokens fit."""
        return self._num_filled == len(self._tokens)

    def add(self, document: TokenDocument, offset: int) -> int:
        """Adds inputs of the document from `offset` on until the row is full.

        Returns:
          The offset of the first input that was not added.
        """
        stop = min(offset + len(self._tokens) - self._num_filled, len(document.stream) - 1)
        columns = slice(self._num_filled, self._num_filled + stop - offset)
        self._num_segments += 1
        self._tokens[columns] = document.stream[offset:stop]
        self._targets[columns] = document.stream[offset + 1 : stop + 1]
        self._segment_ids[columns] = self._num_segments
        self._num_bytes += int(document.num_bytes[offset:stop].sum())
        self._num_filled = columns.stop
        return stop

    def build(self) -> Row:
        """The row with what has been added so far."""
        return Row(self._tokens, self._targets, self._segment_ids, self._num_bytes)


def collate(rows: Sequence[Row], *, num_rows: int) -> CountedBatch:
    """Stacks rows into a batch.

    Args:
      rows: at most `num_rows` rows.
      num_rows: rows of the batch; missing ones are padding.
    """
    shape = (num_rows, len(rows[0].tokens))
    tokens, targets, segment_ids = np.zeros((3, *shape), np.int32)
    for index, row in enumerate(rows):
        tokens[index], targets[index], segment_ids[index] = row[:3]
    weights = (segment_ids > 0).astype(np.float32)
    batch = Batch(tokens, targets, segment_ids, weights)  # type: ignore[arg-type]
    return CountedBatch(batch, sum(row.num_bytes for row in rows))
