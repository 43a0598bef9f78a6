"""Reads the documents of one source piece by piece and cuts their tokens into rows."""

from typing import Any, Literal, NamedTuple

import numpy as np

from megalodon_jax.data.contents import Content
from megalodon_jax.data.documents import Documents, NextDocument
from megalodon_jax.data.examples import ExampleFormat
from megalodon_jax.data.labelled import LabelledFormat
from megalodon_jax.data.packing import Row, RowBuilder, TokenPiece
from megalodon_jax.data.pieces import read_piece
from megalodon_jax.data.text_files import naming
from megalodon_jax.data.tokenizer import Tokenizer, count_bytes
from megalodon_jax.errors import DataError

BadDocuments = Literal["stop", "skip"]
# As many bad documents in a row show that the field, the format or the encoding is wrong.
MAX_BAD_IN_A_ROW = 10_000


def with_way_out(error: DataError) -> DataError:
    """The error of a bad document, with the setting that leaves it out."""
    return DataError(f"{error}; data.on_bad_document = 'skip' leaves such documents out")


class ReadOptions(NamedTuple):
    """How documents are read.

    Attributes:
      tokenizer: from text to ids.
      seq_len: tokens per row.
      packing: see `DataConfig.packing`.
      count_bytes: whether to count the text bytes of every token.
      on_bad_document: see `DataConfig.on_bad_document`.
      examples: how examples of a prompt and a response, or of a class, are read; None: documents
        are running text.
      carry_state: rows follow each other: documents are numbered as `Batch` says of
        `data.carry_state`.
    """

    tokenizer: Tokenizer
    seq_len: int
    packing: Literal["pack", "pad"]
    count_bytes: bool
    on_bad_document: BadDocuments
    examples: ExampleFormat | LabelledFormat | None = None
    carry_state: bool = False


class _Place(NamedTuple):
    """Where in a document a piece starts.

    Attributes:
      start: its first byte.
      previous: the token before it.
      carry: text bytes before it that no token encodes.
      has_tokens: whether the document has tokens before it.
    """

    start: int
    previous: int
    carry: int
    has_tokens: bool


class RowReader:
    """Rows of one source; the position is the next unread token.

    Memory does not depend on the size of a document: it is read in pieces (`pieces`).

    Args:
      documents: the documents, in order.
      options: how to read them.
      source: number of the source.
    """

    def __init__(self, documents: Documents, options: ReadOptions, *, source: int):
        self._documents = documents
        self._options = options
        self._source = source
        self._dtype = np.min_scalar_type(options.tokenizer.vocab_size - 1)
        self._document: NextDocument | None = None
        self._content: Content | None = None
        self._before_document = documents.position()
        self._bad_documents = 0
        self._num_bad_in_a_row = 0

    def position(self) -> dict[str, Any]:
        """The position as JSON values."""
        if self._document is None:
            position: dict[str, Any] = {"documents": self._documents.position()}
        else:
            position = {
                "documents": self._before_document,
                "piece": list(self._place),
                "offset": self._offset,
            }
        return {**position, "bad_documents": self._bad_documents}

    def move_to(self, position: dict[str, Any]) -> None:
        """Moves to a saved position.

        Raises:
          DataError: the document there cannot be read.
        """
        self._documents.move_to(position["documents"])
        self._document = None
        self._num_bad_in_a_row = 0
        if "piece" in position and self._next_document():
            self._open_piece(_Place(*position["piece"]))
            self._offset = position["offset"]
        # Bad documents before the position have been counted.
        self._bad_documents = position["bad_documents"]

    def next_epoch(self) -> int | None:
        """The epoch of the next row; None at the end of the data."""
        return self._document.epoch if self._has_token() and self._document else None

    def open_epoch(self) -> int | None:
        """The epoch of the document that is being read; None if the next one is not open yet."""
        return self._document.epoch if self._has_token_of_document() and self._document else None

    def next_row(self, epoch: int | None) -> Row:
        """The next row, padded at the end of the epoch; None: it goes on with the next epoch.

        With packing `pad` a row holds tokens of one document only.
        """
        first_segment = 2 if self._options.carry_state and not self._continues_document() else 1
        row = RowBuilder(self._options.seq_len, self._dtype, first_segment=first_segment)
        self.fill(row, epoch)
        return row.build(source=self._source, bad_documents=self.take_bad_documents())

    def fill(self, row: RowBuilder, epoch: int | None) -> bool:
        """Adds tokens to a row until it is complete, or the epoch ends; says which."""
        last_added: NextDocument | None = None
        while not row.is_full and self._has_token():
            document = self._document
            if document is None or epoch not in (None, document.epoch):
                return False
            self._offset = row.add(self._piece, self._offset, continues=document is last_added)
            last_added = document
            if self._offset == len(self._piece.stream) - 1 and self._next_place is None:
                self._document = self._content = None
                if self._options.packing == "pad":
                    return True
        return row.is_full

    def take_bad_documents(self) -> int:
        """Number of documents that could not be read since the last call."""
        number, self._bad_documents = self._bad_documents, 0
        return number

    def _continues_document(self) -> bool:
        """Whether the next token is not the first one of its document."""
        return self._has_token() and (self._place.has_tokens or self._offset > 0)

    def _has_token(self) -> bool:
        """Opens documents and pieces until there is an unread token; False at the end."""
        while not self._has_token_of_document():
            if not self._next_document():
                return False
            self._open_piece(_Place(0, self._options.tokenizer.bos_id, 0, False))
        return True

    def _has_token_of_document(self) -> bool:
        """Opens pieces of the open document until there is an unread token; False at its end."""
        while self._document is not None:
            if self._offset < len(self._piece.stream) - 1:
                self._num_bad_in_a_row = 0
                return True
            if self._next_place is None:
                self._document = self._content = None
            else:
                self._open_piece(self._next_place)
        return False

    def _next_document(self) -> bool:
        self._before_document = self._documents.position()
        self._document = self._documents.next()
        self._content = None
        return self._document is not None

    def _open_piece(self, place: _Place) -> None:
        """Reads and tokenizes the piece at a place; a document without a token gets no eos."""
        try:
            ids, num_bytes, carry, stop = self._encode(place)
        except DataError as error:
            self._count_bad(error)
            ids, num_bytes, carry, stop = np.zeros(0, self._dtype), None, place.carry, None
        has_tokens = place.has_tokens or len(ids) > 0
        ends = [self._options.tokenizer.eos_id] if stop is None and has_tokens else []
        stream = np.concatenate([[place.previous], ids, ends]).astype(self._dtype)
        if self._options.count_bytes:
            num_bytes = np.zeros(0, np.int64) if num_bytes is None else num_bytes
            # Skipped text counts with the next token, eos at last.
            num_bytes = np.concatenate([num_bytes, [carry] * len(ends)]).astype(np.int64)
        self._piece = TokenPiece(stream, num_bytes, has_tokens and not place.has_tokens)
        self._place, self._offset = place, 0
        self._next_place = (
            None if stop is None else _Place(stop, int(stream[-1]), carry, has_tokens)
        )

    def _encode(self, place: _Place) -> tuple[np.ndarray, np.ndarray | None, int, int | None]:
        """Ids of the piece at a place, the bytes of each and after the last, the next piece."""
        tokenizer = self._options.tokenizer
        assert self._document is not None
        with naming(self._document.where):
            if self._content is None:
                self._content = self._document.open()
            piece = read_piece(self._content, place.start, tokenizer)
            stop = None if piece.is_last else piece.stop
            if not self._options.count_bytes:
                return tokenizer.encode(piece.text), None, 0, stop
            ids, num_bytes, tail = tokenizer.encode_counted(piece.text)
        # The tokenizer puts back a space that was left out at the cut.
        tail += piece.stop - piece.start - count_bytes(piece.text)
        if len(ids) == 0:
            return ids, num_bytes, place.carry + tail, stop
        num_bytes = num_bytes.copy()
        num_bytes[0] += place.carry
        return ids, num_bytes, tail, stop

    def _count_bad(self, error: DataError) -> None:
        if self._options.on_bad_document == "stop":
            raise with_way_out(error) from error
        self._bad_documents += 1
        self._num_bad_in_a_row += 1
        if self._num_bad_in_a_row >= MAX_BAD_IN_A_ROW:
            raise DataError(
                f"{MAX_BAD_IN_A_ROW:,} documents in a row cannot be read; the last one: {error}"
            ) from error
