"""The grain pipeline from a source to batches. `loader.py` imports it, and grain, when it runs."""

import functools
from typing import Any, Literal, cast

import grain
import numpy as np
from absl import flags

from megalodon_jax.config import DataConfig
from megalodon_jax.data.packing import (
    CountedBatch,
    Row,
    RowBuilder,
    TokenDocument,
    collate,
    tokenize_document,
)
from megalodon_jax.data.sources import Document, Source
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.typing import Batch

# Rows are shuffled within windows of this many tokens, so that one long document does not make many
# batches in a row by itself. 12 bytes per token are held.
WINDOW_TOKENS = 1 << 20
# While a window is read no batch can be made, so batches of the one before are kept ready.
READY_TOKENS = 1 << 20
MAX_READY_BATCHES = 256
SINGLE_PASS_SEED = 0
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def training_batches(
    source: Source,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    shard: int,
    num_shards: int,
) -> grain.IterDataset[CountedBatch]:
    """An endless stream, shuffled anew every epoch: the documents and rows of one shard."""
    documents = (
        grain.MapDataset.source(cast(Any, source))
        .shuffle(seed=config.shuffle_seed)
        .repeat()
        .map_with_index(_Tokenize(tokenizer, len(source), count_bytes=False))
    )[shard::num_shards]
    num_rows = config.batch_size // num_shards
    rows = PackedRows(
        documents.to_iter_dataset(READ_OPTIONS),
        seq_len=config.seq_len,
        packing=config.packing,
        window=max(1, WINDOW_TOKENS // config.seq_len),
        seed=config.shuffle_seed,
    )
    batches = rows.batch(num_rows, batch_fn=functools.partial(collate, num_rows=num_rows))
    if config.num_workers > 0:
        # grain reads absl flags there, which raise unless the program has parsed them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=4)
        return batches.mp_prefetch(workers).map(_out_of_shared_memory)
    num_ready = min(MAX_READY_BATCHES, max(2, READY_TOKENS // (num_rows * config.seq_len)))
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=num_ready)


def single_pass_batches(
    source: Source, tokenizer: Tokenizer, config: DataConfig
) -> grain.IterDataset[CountedBatch]:
    """One pass in a fixed random order, in whole batches.

    So rows do not depend on the number of processes, all of them make equally many batches, and the
    first batches stand for the whole whatever the settings of the run.
    """
    documents = (
        grain.MapDataset.source(cast(Any, source))
        .shuffle(seed=SINGLE_PASS_SEED)
        .map_with_index(_Tokenize(tokenizer, len(source), count_bytes=True))
    )
    rows = PackedRows(
        documents.to_iter_dataset(READ_OPTIONS),
        seq_len=config.seq_len,
        packing=config.packing,
        window=1,
        seed=config.shuffle_seed,
    )
    batches = rows.batch(
        config.batch_size, batch_fn=functools.partial(collate, num_rows=config.batch_size)
    )
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)


def _out_of_shared_memory(counted: CountedBatch) -> CountedBatch:
    # Kept batches would hold shared memory open, which is then reported as leaked at exit.
    return counted._replace(batch=Batch(*(np.array(array) for array in counted.batch)))  # type: ignore[arg-type]


class _Tokenize(grain.transforms.MapWithIndex):
    def __init__(self, tokenizer: Tokenizer, num_documents: int, *, count_bytes: bool):
        self._tokenizer = tokenizer
        self._num_documents = num_documents
        self._count_bytes = count_bytes

    def map_with_index(self, index: int, element: Document) -> TokenDocument | None:
        epoch = index // self._num_documents
        return tokenize_document(
            element, self._tokenizer, epoch=epoch, count_bytes=self._count_bytes
        )


class PackedRows(grain.IterDataset[Row]):
    """Rows of documents, shuffled within windows of rows; no row or window holds two epochs.

    grain's own `ConcatThenSplitIterDataset` (0.2.18) has a state that does not survive JSON (its
    tuples come back as lists and are taken for a remainder), and knows nothing of epochs.
    """

    def __init__(
        self,
        parent: grain.IterDataset[TokenDocument],
        *,
        seq_len: int,
        packing: Literal["pack", "pad"],
        window: int,
        seed: int,
    ):
        super().__init__(parent)
        self._seq_len = seq_len
        self._packing: Literal["pack", "pad"] = packing
        self._window = window
        self._seed = seed

    def __iter__(self) -> "_PackedRowIterator":
        packer = _Packer(
            cast(grain.DatasetIterator[TokenDocument], iter(self._parent)),
            self._seq_len,
            self._packing,
        )
        return _PackedRowIterator(packer, self._window, self._seed)


class _Packer:
    """Reads documents and cuts them into rows; its position is that of the next unread token."""

    def __init__(
        self,
        documents: grain.DatasetIterator[TokenDocument],
        seq_len: int,
        packing: Literal["pack", "pad"],
    ):
        self.documents = documents
        self._seq_len = seq_len
        self._packing = packing
        self._document: TokenDocument | None = None
        self._before_document = documents.get_state()
        self._offset = 0

    def position(self) -> dict[str, Any]:
        if self._document is None:
            return {"documents": self.documents.get_state(), "offset": 0}
        return {"documents": self._before_document, "offset": self._offset}

    def move_to(self, position: dict[str, Any]) -> None:
        self.documents.set_state(position["documents"])
        self._document = None
        if position["offset"] and self._read() is not None:
            self._offset = position["offset"]

    def _read(self) -> TokenDocument | None:
        if self._document is None:
            self._before_document = self.documents.get_state()
            self._document = next(self.documents, None)
            self._offset = 0
        return self._document

    def next_epoch(self) -> int | None:
        """The epoch of the next row; None at the end."""
        document = self._read()
        return None if document is None else document.epoch

    def next_row(self, epoch: int) -> Row:
        """A row of one epoch; padded where the epoch ends, or a piece if packing is `pad`."""
        row = RowBuilder(self._seq_len)
        while (
            not row.is_full and (document := self._read()) is not None and document.epoch == epoch
        ):
            self._offset = row.add(document, self._offset)
            if self._offset == len(document.stream) - 1:
                self._document = None
            if self._packing == "pad":
                break
        return row.build()


class _PackedRowIterator(grain.DatasetIterator[Row]):
    """Gives window after window; its state is the window's start and the number of rows given."""

    def __init__(self, packer: _Packer, window: int, seed: int):
        super().__init__(packer.documents)
        self._packer = packer
        self._window = window
        self._seed = seed
        self._window_index = 0
        self._window_start = packer.position()
        self._rows: list[Row] = []
        self._num_given = 0

    def __next__(self) -> Row:
        if self._num_given == len(self._rows):
            if self._rows:
                self._window_index += 1
            self._window_start = self._packer.position()
            self._num_given = 0
            self._rows = self._read_window()
            if not self._rows:
                raise StopIteration
        row = self._rows[self._num_given]
        self._num_given += 1
        return row

    def _read_window(self) -> list[Row]:
        epoch = self._packer.next_epoch()
        if epoch is None:
            return []
        rows: list[Row] = []
        while len(rows) < self._window and self._packer.next_epoch() == epoch:
            rows.append(self._packer.next_row(epoch))
        order = np.random.default_rng((self._seed, self._window_index)).permutation(len(rows))
        return [rows[index] for index in order]

    def get_state(self) -> dict[str, Any]:
        return {
            "window_start": self._window_start,
            "window_index": self._window_index,
            "num_given": self._num_given,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._window_start = state["window_start"]
        self._window_index = state["window_index"]
        self._num_given = state["num_given"]
        self._packer.move_to(self._window_start)
        self._rows = self._read_window() if self._num_given else []
