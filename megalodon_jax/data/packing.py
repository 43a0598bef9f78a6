"""Token documents to rows, rows to batches, in numpy.

A document is the stream mark + tokens + mark. Its inputs are all but the last of the stream, its
targets all but the first, so every token and the closing mark are a target exactly once. A stream
that does not fit is cut: the rest is a new segment in a later row, whose first input is the last
target before the cut.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from megalodon_jax.data.sources import Document
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.typing import Batch


class TokenDocument(NamedTuple):
    """A document as tokens.

    Attributes:
      stream: mark, tokens, mark.
      num_bytes: bytes of text that each target, `stream[1:]`, stands for; 0 if not counted.
      epoch: the pass over the data that this document was read in.
    """

    stream: Int32[np.ndarray, " n"]
    num_bytes: Int32[np.ndarray, " n-1"]
    epoch: int


class Row(NamedTuple):
    """One row of a batch (see `Batch`), and the bytes of text that its targets stand for."""

    tokens: Int32[np.ndarray, " L"]
    targets: Int32[np.ndarray, " L"]
    segment_ids: Int32[np.ndarray, " L"]
    num_bytes: int


class CountedBatch(NamedTuple):
    """A batch, and the bytes of text that its weighted targets stand for.

    Where a process has only some of a batch's rows, the bytes are those of all.
    """

    batch: Batch
    num_bytes: int


def tokenize_document(
    document: Document, tokenizer: Tokenizer, *, epoch: int, count_bytes: bool
) -> TokenDocument | None:
    """Puts a document between its marks; None if it has no token.

    The closing mark stands for no text, or for what the tokenizer left out after its last token.
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
    """A row that is being filled from the left; what is not filled is padding."""

    def __init__(self, seq_len: int):
        self._tokens, self._targets, self._segment_ids = np.zeros((3, seq_len), np.int32)
        self._num_filled = 0
        self._num_segments = 0
        self._num_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether no token fits any more."""
        return self._num_filled == len(self._tokens)

    def add(self, document: TokenDocument, offset: int) -> int:
        """Adds as many of the document's inputs from `offset` on as fit; returns the new offset."""
        stop = min(offset + len(self._tokens) - self._num_filled, len(document.stream) - 1)
        place = slice(self._num_filled, self._num_filled + stop - offset)
        self._num_segments += 1
        self._tokens[place] = document.stream[offset:stop]
        self._targets[place] = document.stream[offset + 1 : stop + 1]
        self._segment_ids[place] = self._num_segments
        self._num_bytes += int(document.num_bytes[offset:stop].sum())
        self._num_filled = place.stop
        return stop

    def build(self) -> Row:
        """The row as it is now."""
        return Row(self._tokens, self._targets, self._segment_ids, self._num_bytes)


def collate(rows: Sequence[Row], *, num_rows: int) -> CountedBatch:
    """Stacks rows into a batch.

    Args:
      rows: at most `num_rows` rows; rows of padding complete them.
      num_rows: rows of the batch.
    """
    shape = (num_rows, len(rows[0].tokens))
    tokens, targets, segment_ids = np.zeros((3, *shape), np.int32)
    for index, row in enumerate(rows):
        tokens[index], targets[index], segment_ids[index] = row[:3]
    weights = (segment_ids > 0).astype(np.float32)
    batch = Batch(tokens, targets, segment_ids, weights)  # type: ignore[arg-type]
    return CountedBatch(batch, sum(row.num_bytes for row in rows))
