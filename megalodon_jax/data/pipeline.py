"""The grain pipeline from documents to batches; imported by `loader.py` on first use."""

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from megalodon_jax.data.documents import Documents, Slice, open_documents
from megalodon_jax.data.example_reader import ExampleReader
from megalodon_jax.data.huggingface import StreamedSource
from megalodon_jax.data.interleaved import InterleavedReader
from megalodon_jax.data.labelled import LabelledFormat, LabelledReader
from megalodon_jax.data.packing import PackedRows, Row, collate
from megalodon_jax.data.reader import ReadOptions, RowReader
from megalodon_jax.data.sources import Source
from megalodon_jax.data.worker_exit import exit_with_parent

# Rows are shuffled within windows of this many tokens. A window takes 6 bytes per token, 12 with
# ids above 65,535.
WINDOW_TOKENS = 1 << 20
# Reading a window yields no batches, so this many tokens of the previous one are prefetched: 16
# bytes each.
PREFETCHED_TOKENS = 1 << 20
MAX_PREFETCHED_BATCHES = 256
SINGLE_PASS_SEED = 0


class MixedSource(NamedTuple):
    """One source of a mixture.

    Attributes:
      source: its documents.
      weight: share of the tokens.
      epochs: number of passes; 0: without end.
    """

    source: Source | StreamedSource
    weight: float
    epochs: int


class BatchDataset(grain.IterDataset[PackedRows]):
    """Batches of rows from a mixture of sources, shuffled within windows of rows.

    Rows have tokens of one source. The next row is read from the source that has the fewest tokens
    for its weight. With one source, a window has rows of one epoch.

    Args:
      sources: the mixture.
      options: how documents are read.
      num_rows: rows of a batch.
      window: rows of a window.
      document_seed: seed of the order of documents.
      row_seed: seed of the order of rows within windows.
      part: the documents that this reader gets.
      interleave: read several documents side by side (`interleaved`).
      state: where to start, from `PackedRows.state`; None: at the first batch.
    """

    def __init__(
        self,
        sources: Sequence[MixedSource],
        options: ReadOptions,
        *,
        num_rows: int,
        window: int,
        document_seed: int,
        row_seed: int,
        part: Slice,
        interleave: bool,
        state: str | None,
    ):
        super().__init__()
        self._make = functools.partial(
            _BatchIterator,
            sources,
            options,
            num_rows=num_rows,
            window=window,
            document_seed=document_seed,
            row_seed=row_seed,
            part=part,
            interleave=interleave,
        )
        self._state = state

    def __iter__(self) -> "_BatchIterator":
        iterator = self._make()
        if self._state is not None:
            iterator.set_state({"state": self._state})
        return iterator


class _BatchIterator(grain.DatasetIterator[PackedRows]):
    """Yields batches; its state is the start of the window and the rows yielded of it."""

    def __init__(
        self,
        sources: Sequence[MixedSource],
        options: ReadOptions,
        *,
        num_rows: int,
        window: int,
        document_seed: int,
        row_seed: int,
        part: Slice,
        interleave: bool,
    ):
        super().__init__()
        self._mixture = _Mixture(
            sources, options, seed=document_seed, part=part, interleave=interleave
        )
        self._num_sources = len(sources)
        self._num_rows = num_rows
        self._window = window
        self._seed = row_seed
        self._window_index = 0
        self._window_start = self._mixture.position()
        self._rows: list[Row] = []
        self._num_yielded = 0

    def __next__(self) -> PackedRows:
        rows: list[Row] = []
        while len(rows) < self._num_rows and (row := self._next_row()) is not None:
            rows.append(row)
        if not rows:
            raise StopIteration
        return collate(
            rows,
            num_rows=self._num_rows,
            num_sources=self._num_sources,
            state=self.get_state()["state"],
        )

    def _next_row(self) -> Row | None:
        if self._num_yielded == len(self._rows):
            if self._rows:
                self._window_index += 1
            self._window_start = self._mixture.position()
            self._num_yielded = 0
            # Freed before the next window is read.
            self._rows = []
            self._rows = self._read_window()
            if not self._rows:
                return None
        row = self._rows[self._num_yielded]
        self._num_yielded += 1
        return row

    def _read_window(self) -> list[Row]:
        rows = self._mixture.read_rows(self._window)
        order = np.random.default_rng((self._seed, self._window_index)).permutation(len(rows))
        return [rows[index] for index in order]

    def get_state(self) -> dict[str, Any]:
        state = {
            "window_start": self._window_start,
            "window_index": self._window_index,
            "num_yielded": self._num_yielded,
        }
        return {"state": json.dumps(state)}

    def set_state(self, state: dict[str, Any]) -> None:
        values = json.loads(state["state"])
        self._window_start = values["window_start"]
        self._window_index = values["window_index"]
        self._num_yielded = values["num_yielded"]
        self._mixture.move_to(self._window_start)
        self._rows = []
        self._rows = self._read_window() if self._num_yielded else []


def open_rows(
    documents: Documents, options: ReadOptions, *, source: int, interleave: bool
) -> InterleavedReader | RowReader | ExampleReader | LabelledReader:
    """The rows of one source: running text, examples of a prompt and a response, or of a class."""
    if isinstance(options.examples, LabelledFormat):
        return LabelledReader(documents, options, source=source)
    if options.examples is not None:
        return ExampleReader(documents, options, source=source)
    reader = InterleavedReader if interleave else RowReader
    return reader(documents, options, source=source)


class _Mixture:
    """The rows of several sources, as many tokens of each as its weight says."""

    def __init__(
        self,
        sources: Sequence[MixedSource],
        options: ReadOptions,
        *,
        seed: int,
        part: Slice,
        interleave: bool,
    ):
        self._weights = [entry.weight for entry in sources]
        self._readers = [
            open_rows(
                open_documents(entry.source, seed=seed, epochs=entry.epochs, part=part),
                options,
                source=number,
                # A stream of a library is read in order, one document after another.
                interleave=interleave and isinstance(entry.source, Source),
            )
            for number, entry in enumerate(sources)
        ]
        self._num_tokens = [0] * len(sources)

    def position(self) -> dict[str, Any]:
        readers = [reader.position() for reader in self._readers]
        return {"sources": readers, "tokens": list(self._num_tokens)}

    def move_to(self, position: dict[str, Any]) -> None:
        self._num_tokens = list(position["tokens"])
        for reader, saved in zip(self._readers, position["sources"], strict=True):
            reader.move_to(saved)

    def read_rows(self, count: int) -> list[Row]:
        """At most `count` rows; fewer at the end of the data, or of the epoch of an only source."""
        rows: list[Row] = []
        first_epoch = self._readers[0].next_epoch() if len(self._readers) == 1 else None
        while len(rows) < count:
            number = self._next_source()
            epoch = None if number is None else self._readers[number].next_epoch()
            if number is None or epoch is None or first_epoch not in (None, epoch):
                break
            rows.append(self._readers[number].next_row(epoch))
            self._num_tokens[number] += rows[-1].counts.tokens
        return rows

    def _next_source(self) -> int | None:
        """The source with the fewest tokens for its weight, of those that have not ended."""
        going_on = [n for n, reader in enumerate(self._readers) if reader.next_epoch() is not None]
        return min(
            going_on, key=lambda n: (self._num_tokens[n] / self._weights[n], n), default=None
        )


def prefetched(
    batches: grain.IterDataset[PackedRows], *, tokens_per_batch: int, in_process: bool
) -> grain.IterDataset[PackedRows]:
    """Reads batches ahead in a thread, or in a process of its own."""
    fitting = PREFETCHED_TOKENS // tokens_per_batch
    if not in_process:
        return grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=min(MAX_PREFETCHED_BATCHES, max(1, fitting))
        )
    # grain's workers read absl flags, which raise an error until they are parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(1, per_worker_buffer_size=min(64, max(1, fitting)))
    return batches.mp_prefetch(options, worker_init_fn=exit_with_parent)
