"""Labelled examples: arrays of one or several documents with a class, packed whole into rows."""

import struct
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from megalodon_jax.data.contents import Content, MemoryContent, read_all
from megalodon_jax.data.documents import Documents, NextDocument
from megalodon_jax.data.packing import Counts, Row, collate
from megalodon_jax.data.sources import Source
from megalodon_jax.data.text_files import naming
from megalodon_jax.errors import DataError
from megalodon_jax.typing import Batch

# As many in a row show that the form of all is another one.
_MAX_BAD_IN_A_ROW = 1_000
_HEADER = struct.Struct("<iB")
_PART = struct.Struct("<cII")
# Token ids travel in the smallest type; values are float32.
_DTYPES: dict[bytes, np.dtype] = {
    b"b": np.dtype(np.uint8),
    b"h": np.dtype(np.uint16),
    b"i": np.dtype(np.int32),
    b"f": np.dtype(np.float32),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class LabelledExample(NamedTuple):
    """An example of a class.

    Attributes:
      documents: one, or the two of a pair: token ids (n,), or values (n, c) in float32.
      label: number of the class.
    """

    documents: tuple[np.ndarray, ...]
    label: int


class ExampleSet(Source):
    """A sequence of labelled examples, read on access; thread-safe.

    Attributes:
      classes: names of the classes, by number.
    """

    classes: tuple[str, ...] = ()

    @abstractmethod
    def example(self, index: int) -> LabelledExample:
        """Example `index`.

        Raises:
          DataError: it cannot be read.
        """

    def open(self, index: int) -> Content:
        """The example as bytes, the form in which the loader reads documents."""
        return MemoryContent(encode_example(self.example(index)))


class LabelledFormat(NamedTuple):
    """How examples are laid in rows.

    Attributes:
      max_length: most tokens of a document; the rest is left out.
      max_documents: most documents of a row.
      align: documents begin at multiples of it.
      value_size: numbers of a token; 0: token ids.
    """

    max_length: int
    max_documents: int
    align: int
    value_size: int

    def settings(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the saved one, as JSON values."""
        return self._asdict()


def encode_example(example: LabelledExample) -> bytes:
    """Bytes that `decode_example` reads."""
    parts = [_HEADER.pack(example.label, len(example.documents))]
    for document in example.documents:
        width = document.shape[1] if document.ndim == 2 else 0
        parts.append(_PART.pack(_CODES[document.dtype], len(document), width))
        parts.append(np.ascontiguousarray(document).tobytes())
    return b"".join(parts)


def decode_example(content: bytes) -> LabelledExample:
    """The example of `encode_example`."""
    label, count = _HEADER.unpack_from(content)
    at, documents = _HEADER.size, []
    for _ in range(count):
        code, length, width = _PART.unpack_from(content, at)
        at += _PART.size
        numbers = length * (width or 1)
        document = np.frombuffer(content, _DTYPES[code], numbers, at)
        at += document.nbytes
        documents.append(document.reshape(length, width) if width else document)
    return LabelledExample(tuple(documents), label)


class _Pending(NamedTuple):
    """The next example, and the position before it."""

    example: LabelledExample
    epoch: int
    before: Any


class LabelledReader:
    """Rows of labelled examples; the position is that before the next example.

    Documents of a row are numbered from 1. The class of an example is the target of its last token,
    whose weight is 1. An example goes into the row that is being filled if it fits, else into the
    next row.

    Args:
      documents: the examples, in order.
      options: a `ReadOptions` whose `examples` are a `LabelledFormat`.
      source: number of the source.
    """

    def __init__(self, documents: Documents, options: Any, *, source: int):
        self._documents = documents
        self._format: LabelledFormat = options.examples
        self._seq_len, self._packing = options.seq_len, options.packing
        self._on_bad_document = options.on_bad_document
        self._source = source
        self._pending: _Pending | None = None
        self._bad_documents = self._num_bad_in_a_row = 0

    def position(self) -> dict[str, Any]:
        """The position as JSON values."""
        pending = self._pending
        return {
            "documents": self._documents.position() if pending is None else pending.before,
            "bad_documents": self._bad_documents,
        }

    def move_to(self, position: dict[str, Any]) -> None:
        """Moves to a saved position."""
        self._documents.move_to(position["documents"])
        self._pending = None
        self._bad_documents, self._num_bad_in_a_row = position["bad_documents"], 0

    def next_epoch(self) -> int | None:
        """The epoch of the next row; None at the end of the data."""
        pending = self._next()
        return None if pending is None else pending.epoch

    def next_row(self, epoch: int) -> Row:
        """The next row; with packing `pad` it holds one example."""
        row = _LabelledRow(self._seq_len, self._format)
        while (pending := self._next()) is not None and pending.epoch == epoch:
            if not row.add(pending.example):
                break
            self._pending = None
            if self._packing == "pad":
                break
        bad_documents, self._bad_documents = self._bad_documents, 0
        return row.build(self._source, bad_documents=bad_documents)

    def _next(self) -> _Pending | None:
        while self._pending is None:
            before = self._documents.position()
            document = self._documents.next()
            if document is None:
                return None
            try:
                example = self._read(document)
            except DataError as error:
                self._count_bad(error)
                continue
            self._num_bad_in_a_row = 0
            self._pending = _Pending(example, document.epoch, before)
        return self._pending

    def _count_bad(self, error: DataError) -> None:
        if self._on_bad_document == "stop":
            raise DataError(
                f"{error}; data.on_bad_document = 'skip' leaves such examples out"
            ) from error
        self._bad_documents += 1
        self._num_bad_in_a_row += 1
        if self._num_bad_in_a_row >= _MAX_BAD_IN_A_ROW:
            raise DataError(
                f"{_MAX_BAD_IN_A_ROW:,} examples in a row cannot be read; the last one: {error}"
            ) from error

    def _read(self, document: NextDocument) -> LabelledExample:
        with naming(document.where):
            example = decode_example(read_all(document.open()))
            documents = tuple(each[: self._format.max_length] for each in example.documents)
            if not all(len(each) for each in documents):
                raise DataError("the example is empty")
            return example._replace(documents=documents)


class _LabelledRow:
    """A row that is filled from the left."""

    def __init__(self, seq_len: int, layout: LabelledFormat):
        size = layout.value_size
        shape, dtype = ((seq_len, size), np.float32) if size else ((seq_len,), np.int32)
        self._tokens = np.zeros(shape, dtype)
        self._targets, self._segment_ids = np.zeros((2, seq_len), np.int32)
        self._loss_mask = np.zeros(seq_len, bool)
        self._layout = layout
        self._end = self._num_documents = self._num_examples = 0

    def add(self, example: LabelledExample) -> bool:
        """Adds the documents of an example; False if they do not fit."""
        align, count = self._layout.align, len(example.documents)
        places, end = [], self._end
        for document in example.documents:
            start = -(-end // align) * align
            end = start + len(document)
            places.append(slice(start, end))
        if end > len(self._targets) or self._num_documents + count > self._layout.max_documents:
            if not self._end:
                raise DataError(
                    f"an example of {count} documents, {end} tokens, does not fit into a row of "
                    f"{len(self._targets)} tokens; raise data.seq_len, or lower examples.max_length"
                )
            return False
        for document, place in zip(example.documents, places, strict=True):
            self._num_documents += 1
            self._tokens[place], self._segment_ids[place] = document, self._num_documents
        self._targets[end - 1], self._loss_mask[end - 1] = example.label, True
        self._end, self._num_examples = end, self._num_examples + 1
        return True

    def build(self, source: int, *, bad_documents: int = 0) -> Row:
        """The row with what has been added so far."""
        tokens = int(np.count_nonzero(self._segment_ids))
        counts = Counts(tokens, self._num_examples, bad_documents)
        arrays = (self._tokens, self._targets, self._segment_ids)
        return Row(*arrays, 0, source, counts, loss_mask=self._loss_mask)


def pack_examples(
    examples: Sequence[LabelledExample], layout: LabelledFormat, *, num_rows: int, seq_len: int
) -> Batch:
    """A batch of one example a row; missing rows are padding.

    Raises:
      DataError: an example does not fit into a row.
    """
    rows = []
    for example in examples:
        documents = tuple(each[: layout.max_length] for each in example.documents)
        row = _LabelledRow(seq_len, layout)
        row.add(example._replace(documents=documents))
        rows.append(row.build(0))
    return collate(rows, num_rows=num_rows, num_sources=1, state="").batch
