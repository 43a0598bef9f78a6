"""The grain pipeline from documents to batches; imported by `loader.py` on first use."""

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

# Rows are shuffled within windows of this many tokens, so that consecutive batches do not all come
# from one long document. A window takes 12 bytes per token.
WINDOW_TOKENS = 1 << 20
# Reading a window yields no batches, so this many tokens of the previous one are prefetched.
PREFETCHED_TOKENS = 1 << 20
MAX_PREFETCHED_BATCHES = 256
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
    """The endless batches of one data shard, reshuffled every epoch."""
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
        # grain's workers read absl flags, which raise an error until they are parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=4)
        return batches.mp_prefetch(workers).map(_copy_from_shared_memory)
    num_prefetched = PREFETCHED_TOKENS // (num_rows * config.seq_len)
    return grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=min(MAX_PREFETCHED_BATCHES, max(2, num_prefetched))
    )


def single_pass_batches(
    source: Source, tokenizer: Tokenizer, config: DataConfig
) -> grain.IterDataset[CountedBatch]:
    """A single pass in a fixed random order, as global batches.

    The order depends neither on the number of processes nor on the run's settings, so all processes
    get the same number of batches and the first batches are representative.
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


def _copy_from_shared_memory(counted: CountedBatch) -> CountedBatch:
    # A batch that outlives its worker keeps shared memory open, which Python reports as leaked.
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
    """Rows of packed documents, shuffled within windows of rows; a window has rows of one epoch.

    grain's `ConcatThenSplitIterDataset` (0.2.18) has a state that does not survive JSON (tuples
    come back as lists and are read as a remainder), and it packs across epochs.
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
    """Reads documents and cuts them into rows; its position is the next unread token."""

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
        """The epoch of the next row; None at the end of the data."""
        document = self._read()
        return None if document is None else document.epoch

    def next_row(self, epoch: int) -> Row:
        """The next row, padded at the end of the epoch.

        With packing `pad` a row holds tokens of one document only.
        """
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
    """Yields rows window by window; its state is the window's start and the rows yielded of it."""

    def __init__(self, packer: _Packer, window: int, seed: int):
        super().__init__(packer.documents)
        self._packer = packer
        self._window = window
        self._seed = seed
        self._window_index = 0
        self._window_start = packer.position()
        self._rows: list[Row] = []
        self._num_yielded = 0

    def __next__(self) -> Row:
        if self._num_yielded == len(self._rows):
            if self._rows:
                self._window_index += 1
            self._window_start = self._packer.position()
            self._num_yielded = 0
            self._rows = self._read_window()
            if not self._rows:
                raise StopIteration
        row = self._rows[self._num_yielded]
        self._num_yielded += 1
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
            "num_yielded": self._num_yielded,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._window_start = state["window_start"]
        self._window_index = state["window_index"]
        self._num_yielded = state["num_yielded"]
        self._packer.move_to(self._window_start)
        self._rows = self._read_window() if self._num_yielded else []
