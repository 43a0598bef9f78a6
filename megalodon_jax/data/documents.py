"""The documents of one source in the order of training, with a position that is saved exactly."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from megalodon_jax.data.contents import Content, MemoryContent
from megalodon_jax.data.huggingface import StreamedSource
from megalodon_jax.data.order import BlockOrder, ShuffledOrder
from megalodon_jax.data.sources import Source
from megalodon_jax.data.text_files import text_of_field
from megalodon_jax.errors import DataError

State = Any


class NextDocument(NamedTuple):
    """A document that is read next.

    Attributes:
      epoch: number of the pass over the source, from 0.
      where: its place, for messages.
      open: opens its bytes; raises `DataError`.
    """

    epoch: int
    where: Callable[[], str]
    open: Callable[[], Content]


class Documents(Protocol):
    """Documents one after another."""

    def position(self) -> State:
        """The position before the next document, as JSON values."""
        ...

    def move_to(self, position: State) -> None:
        """Moves to a position."""
        ...

    def next(self) -> NextDocument | None:
        """The next document; None at the end of the last epoch."""
        ...


class Slice(NamedTuple):
    """Every `step`-th document of every epoch's order, from `first` on."""

    first: int
    step: int


def open_documents(
    source: Source | StreamedSource, *, seed: int, epochs: int, part: Slice
) -> Documents:
    """The documents of a source, shuffled anew in every epoch; a stream keeps its order.

    Args:
      source: the source.
      seed: seed of the order.
      epochs: number of passes; 0: without end.
      part: the documents that one reader gets.
    """
    if isinstance(source, StreamedSource):
        return _StreamedDocuments(source, epochs, part)
    return _IndexedDocuments(source, seed, epochs, part)


class _IndexedDocuments:
    """Documents of a source with access by index; the position is the number of those read."""

    def __init__(self, source: Source, seed: int, epochs: int, part: Slice):
        blocks = source.blocks()
        self._order = (
            ShuffledOrder(len(source), seed) if blocks is None else BlockOrder(blocks, seed)
        )
        self._source = source
        self._epochs = epochs
        self._part = part
        self._num_read = 0

    def position(self) -> State:
        return self._num_read

    def move_to(self, position: State) -> None:
        self._num_read = position

    def next(self) -> NextDocument | None:
        visit = self._part.first + self._num_read * self._part.step
        step = visit // self._source.repeats
        epoch = step // len(self._source)
        if self._epochs and epoch >= self._epochs:
            return None
        self._num_read += 1
        source, index = self._source, self._order[step]
        return NextDocument(
            epoch, lambda: source.where(index), lambda: source.open_visit(index, visit)
        )


class _StreamedDocuments:
    """Documents of a stream; the position is the library's own, and the number read of an epoch."""

    def __init__(self, source: StreamedSource, epochs: int, part: Slice):
        self._source = source
        self._epochs = epochs
        self._part = part
        self._stream = source.open_stream()
        self._start = copy.deepcopy(self._stream.state_dict())
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self.move_to({"epoch": epoch, "num_read": 0, "stream": self._start})

    def position(self) -> State:
        # The library changes its state in place.
        stream = copy.deepcopy(self._stream.state_dict())
        return {"epoch": self._epoch, "num_read": self._num_read, "stream": stream}

    def move_to(self, position: State) -> None:
        self._epoch, self._num_read = position["epoch"], position["num_read"]
        self._stream.load_state_dict(copy.deepcopy(position["stream"]))
        self._examples = iter(self._stream)

    def next(self) -> NextDocument | None:
        num_empty_epochs = 0
        while not self._epochs or self._epoch < self._epochs:
            while (example := self._next_example()) is not None:
                index = self._num_read
                self._num_read += 1
                if index % self._part.step == self._part.first and self._source.is_selected(index):
                    return self._document(index, example)
            num_empty_epochs += 1
            if num_empty_epochs > 1:
                raise DataError(f"no document of {self._source.name(0)[:-2]} belongs to this split")
            self._start_epoch(self._epoch + 1)
        return None

    def _next_example(self) -> dict[str, Any] | None:
        try:
            return next(self._examples, None)
        except (OSError, ValueError, KeyError) as error:
            where = self._source.name(self._num_read)
            raise DataError(f"{where}: cannot read the stream: {error}") from error

    def _document(self, index: int, example: dict[str, Any]) -> NextDocument:
        source = self._source

        def open_example() -> Content:
            return MemoryContent(text_of_field(example, source.field).encode("utf-8"))

        return NextDocument(self._epoch, lambda: source.name(index), open_example)
