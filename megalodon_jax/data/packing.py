"""Packing of token documents into rows and batches, in numpy.

A document is the stream bos + tokens + eos. Its inputs are the stream without the last token, its
targets the stream without the first, so every token and eos is a target exactly once. A stream that
does not fit into a row is cut: the rest is a new segment in a later row, and its first input is the
last target before the cut.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64

from megalodon_jax.typing import Batch


class TokenPiece(NamedTuple):
    """Consecutive tokens of a document.

    Attributes:
      stream: the token before the first target, then the targets.
      num_bytes: text bytes that each target encodes; None if not counted.
      starts_document: whether the first target is the document's first.
    """

    stream: Int[np.ndarray, " n"]
    num_bytes: Int[np.ndarray, " n-1"] | None
    starts_document: bool


class Counts(NamedTuple):
    """Counts of the rows of one source.

    Attributes:
      tokens: targets.
      documents: documents that start in the rows.
      bad_documents: documents that were left out, or end early, because they cannot be read.
      dropped: examples that were left out, because they are too long or have no response.
      truncated: examples whose end was left out, because they are too long.
    """

    tokens: int
    documents: int
    bad_documents: int
    dropped: int = 0
    truncated: int = 0


class Row(NamedTuple):
    """One row of a batch (see `Batch`), in the smallest types that hold it.

    Attributes:
      tokens: inputs; values (L, c) in float32 for encoders of images and sound.
      targets: targets.
      segment_ids: number of the segment, from 1; 0: padding.
      num_bytes: text bytes that the targets encode; 0 if not counted.
      source: number of the source that it is from.
      counts: tokens and documents of the row.
      loss_mask: targets that the loss counts; None: all that are not padding.
    """

    tokens: np.ndarray
    targets: Int[np.ndarray, " L"]
    segment_ids: Int[np.ndarray, " L"]
    num_bytes: int
    source: int
    counts: Counts
    loss_mask: Bool[np.ndarray, " L"] | None = None


class RowBuilder:
    """A row that is filled from the left; the rest is padding.

    Args:
      seq_len: tokens of the row.
      dtype: type of the token ids.
      first_segment: number of the first document.
    """

    def __init__(self, seq_len: int, dtype: np.dtype, *, first_segment: int = 1):
        self._tokens, self._targets = np.zeros((2, seq_len), dtype)
        self._segment_ids = np.zeros(seq_len, np.min_scalar_type(seq_len + 1))
        self._num_filled = 0
        self._num_segments = first_segment - 1
        self._num_documents = 0
        self._num_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether no more tokens fit."""
        return self._num_filled == len(self._tokens)

    @property
    def num_filled(self) -> int:
        """Number of tokens."""
        return self._num_filled

    def add(self, piece: TokenPiece, offset: int, *, continues: bool) -> int:
        """Adds inputs of a piece from `offset` on until the row is full.

        Args:
          piece: the tokens.
          offset: first input to add.
          continues: the piece goes on with the segment that was added last.

        Returns:
          The offset of the first input that was not added.
        """
        stop = min(offset + len(self._tokens) - self._num_filled, len(piece.stream) - 1)
        columns = slice(self._num_filled, self._num_filled + stop - offset)
        self._num_segments += not continues
        self._num_documents += piece.starts_document and offset == 0
        self._tokens[columns] = piece.stream[offset:stop]
        self._targets[columns] = piece.stream[offset + 1 : stop + 1]
        self._segment_ids[columns] = self._num_segments
        if piece.num_bytes is not None:
            self._num_bytes += int(piece.num_bytes[offset:stop].sum())
        self._num_filled = columns.stop
        return stop

    def build(self, *, source: int, bad_documents: int) -> Row:
        """The row with what has been added so far."""
        counts = Counts(self._num_filled, self._num_documents, bad_documents)
        return Row(self._tokens, self._targets, self._segment_ids, self._num_bytes, source, counts)


class PackedRows(NamedTuple):
    """Rows of a batch that one reader has packed.

    Attributes:
      batch: the arrays.
      num_bytes: text bytes that its weighted targets encode; 0 if not counted.
      counts: `Counts` by source.
      state: the reader's position after it, as JSON text.
    """

    batch: Batch
    num_bytes: int
    counts: Int64[np.ndarray, "S 5"]
    state: str


def collate(rows: Sequence[Row], *, num_rows: int, num_sources: int, state: str) -> PackedRows:
    """Stacks rows into a batch.

    Args:
      rows: at most `num_rows` rows.
      num_rows: rows of the batch; missing ones are padding.
      num_sources: number of sources S.
      state: the reader's position after the last row.
    """
    shape = (num_rows, len(rows[0].tokens))
    targets, segment_ids = np.zeros((2, *shape), np.int32)
    first = rows[0].tokens
    is_value = first.dtype == np.float32
    tokens = np.zeros((num_rows, *first.shape), np.float32 if is_value else np.int32)
    counts = np.zeros((num_sources, len(Counts._fields)), np.int64)
    weights = np.zeros(shape, np.float32)
    for index, row in enumerate(rows):
        tokens[index], targets[index], segment_ids[index] = row[:3]
        counts[row.source] += row.counts
        weights[index] = row.segment_ids > 0 if row.loss_mask is None else row.loss_mask
    batch = Batch(tokens, targets, segment_ids, weights)  # type: ignore[arg-type]
    return PackedRows(batch, sum(row.num_bytes for row in rows), counts, state)
