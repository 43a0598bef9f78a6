"""Reads examples of a prompt and a response and packs them whole into rows."""

from typing import Any, NamedTuple

import numpy as np

from megalodon_jax.data.contents import read_all
from megalodon_jax.data.documents import Documents, NextDocument
from megalodon_jax.data.examples import Example, ExampleFormat, encode_example
from megalodon_jax.data.packing import Row, RowBuilder, TokenPiece
from megalodon_jax.data.pieces import decode_utf8
from megalodon_jax.data.reader import MAX_BAD_IN_A_ROW, ReadOptions, with_way_out
from megalodon_jax.data.text_files import naming
from megalodon_jax.errors import DataError


class _Pending(NamedTuple):
    """The next example, and the position before it."""

    example: Example
    epoch: int
    is_truncated: bool
    before: Any


class ExampleReader:
    """Rows of one source; the position is that before the next example.

    An example goes into the row that is being filled if it fits, else into the next row, each as a
    segment of its own. Examples of more than `max_length` tokens are left out or lose their end.

    Args:
      documents: the records, in order.
      options: how to read them, with `examples`.
      source: number of the source.
    """

    def __init__(self, documents: Documents, options: ReadOptions, *, source: int):
        assert isinstance(options.examples, ExampleFormat)
        self._documents = documents
        self._options = options
        self._format = options.examples
        self._source = source
        self._dtype = np.min_scalar_type(options.tokenizer.vocab_size - 1)
        self._pending: _Pending | None = None
        self._bad_documents = self._dropped = self._num_left_out_in_a_row = 0

    def position(self) -> dict[str, Any]:
        """The position as JSON values."""
        pending = self._pending
        return {
            "documents": self._documents.position() if pending is None else pending.before,
            "bad_documents": self._bad_documents,
            "dropped": self._dropped,
        }

    def move_to(self, position: dict[str, Any]) -> None:
        """Moves to a saved position."""
        self._documents.move_to(position["documents"])
        self._pending = None
        self._num_left_out_in_a_row = 0
        self._bad_documents, self._dropped = position["bad_documents"], position["dropped"]

    def next_epoch(self) -> int | None:
        """The epoch of the next row; None at the end of the data."""
        pending = self._next()
        return None if pending is None else pending.epoch

    def next_row(self, epoch: int) -> Row:
        """The next row; with packing `pad` it holds one example."""
        row = RowBuilder(self._options.seq_len, self._dtype)
        loss_mask = np.zeros(self._options.seq_len, bool)
        truncated = 0
        while (pending := self._next()) is not None and pending.epoch == epoch:
            stream, is_response = pending.example
            start = row.num_filled
            stop = start + len(is_response)
            if stop > len(loss_mask):
                break
            row.add(TokenPiece(stream.astype(self._dtype), None, True), 0, continues=False)
            loss_mask[start:stop] = is_response
            truncated += pending.is_truncated
            self._pending = None
            if self._options.packing == "pad":
                break
        built = row.build(source=self._source, bad_documents=self._bad_documents)
        counts = built.counts._replace(dropped=self._dropped, truncated=truncated)
        self._bad_documents = self._dropped = 0
        return built._replace(counts=counts, loss_mask=loss_mask)

    def _next(self) -> _Pending | None:
        """The next example that is not left out; None at the end."""
        while self._pending is None:
            before = self._documents.position()
            document = self._documents.next()
            if document is None:
                return None
            try:
                example = self._read(document)
            except DataError as error:
                if self._options.on_bad_document == "stop":
                    raise with_way_out(error) from error
                self._bad_documents += 1
                self._check_progress(str(error))
                continue
            fitting, is_truncated = self._fit(example)
            if fitting is None:
                self._dropped += 1
                self._check_progress(f"{document.where()}: no response within sft.max_length")
                continue
            self._num_left_out_in_a_row = 0
            self._pending = _Pending(fitting, document.epoch, is_truncated, before)
        return self._pending

    def _read(self, document: NextDocument) -> Example:
        with naming(document.where):
            text = decode_utf8(read_all(document.open()))
            return encode_example(text, self._options.tokenizer, self._format.template)

    def _fit(self, example: Example) -> tuple[Example | None, bool]:
        """The example within the length, or None; and whether its end was left out."""
        length = self._format.max_length
        if len(example.is_response) <= length:
            return (example if example.is_response.any() else None), False
        if self._format.too_long == "drop" or not example.is_response[:length].any():
            return None, False
        return Example(example.stream[: length + 1], example.is_response[:length]), True

    def _check_progress(self, reason: str) -> None:
        self._num_left_out_in_a_row += 1
        if self._num_left_out_in_a_row >= MAX_BAD_IN_A_ROW:
            raise DataError(
                f"{MAX_BAD_IN_A_ROW:,} examples in a row cannot be used; the last one: {reason}"
            )
