"""Batches from a configuration: endless for training, one exact pass for measuring."""

import json
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from megalodon_jax.config import DataConfig
from megalodon_jax.data.errors import DataError
from megalodon_jax.data.sources import Source, Split, open_source
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.typing import Batch

if TYPE_CHECKING:
    import grain

    from megalodon_jax.data.packing import CountedBatch

STATE_VERSION = 1


class Loader(Iterator[Batch]):
    """An iterator over batches of numpy arrays that can be saved and restored exactly.

    Made by `make_loader`. Batches are prepared by a thread, or by processes, that start with the
    first one. A loader must be used by one thread at a time.
    """

    def __init__(
        self,
        batches: "grain.IterDataset[CountedBatch]",
        settings: dict[str, Any],
        *,
        counts_bytes: bool,
    ):
        # Closed and dropped at exit at the latest: grain's iterators, closed or not, print an error
        # from `__del__` if they outlive their modules.
        self._opened = [iter(batches)]
        self._finalizer = weakref.finalize(self, _close_all, self._opened)
        self._start = self._iterator.get_state()
        self._settings = settings
        self._counts_bytes = counts_bytes

    @property
    def _iterator(self) -> "grain.DatasetIterator[CountedBatch]":
        if not self._opened:
            raise ValueError("this loader is closed; make a new one")
        return self._opened[0]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch: (batch_size / process_count, seq_len) arrays.

        Raises:
          StopIteration: the pass is over (never with `repeat`).
          DataError: a document cannot be read.
        """
        return next(self._iterator).batch

    def with_bytes(self) -> "Iterator[CountedBatch]":
        """The same batches, each with the bytes of text that its weighted targets stand for.

        The count is over the whole batch of all processes. Over complete documents the counts add
        up to exactly their UTF-8 bytes, so bits per byte = total loss in nats / ln 2 / total
        bytes, where the loss includes that of the closing marks.

        Raises:
          ValueError: this loader repeats; only single passes count.
        """
        if not self._counts_bytes:
            raise ValueError(
                "a loader made with repeat=True does not count bytes; use repeat=False"
            )
        return self._counted_batches()

    def _counted_batches(self) -> "Iterator[CountedBatch]":
        while (batch := next(self._iterator, None)) is not None:
            yield batch

    def rewind(self) -> None:
        """Goes back to the first batch."""
        self._iterator.set_state(self._start)

    def state_dict(self) -> dict[str, Any]:
        """Where this loader is, as JSON values. Each process of a run has its own."""
        position = json.loads(json.dumps(self._iterator.get_state()))
        return {"version": STATE_VERSION, "settings": self._settings, "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state: the following batches are bitwise those that followed it.

        Raises:
          DataError: the state was saved with other data or settings (those that differ are named).
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(
                f"the data state has version {state.get('version')!r}, "
                f"this code reads {STATE_VERSION}"
            )
        saved = state["settings"]
        changes = [
            f"{key} was {saved.get(key)!r} and is {value!r}"
            for key, value in self._settings.items()
            if saved.get(key) != value
        ]
        if changes:
            raise DataError(f"cannot continue in changed data: {'; '.join(changes)}")
        self._iterator.set_state(state["position"])

    def close(self) -> None:
        """Stops the thread or the processes that prepare batches; the loader is of no use then."""
        self._finalizer()


def _close_all(opened: "list[grain.DatasetIterator[CountedBatch]]") -> None:
    while opened:
        opened.pop().close()


def make_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: Split,
    *,
    process_index: int = 0,
    process_count: int = 1,
    repeat: bool,
) -> Loader:
    """Makes the loader of one side of the data.

    With `repeat` it never ends: every epoch has a new order of documents (`shuffle_seed`), and of
    rows within windows of 2^20 tokens; process i of n reads every n-th document. An epoch's last
    row is padded, so that it has every target exactly once. `num_workers` processes help where
    tokenization is slow (bytes are faster without: 6 to 30 MB/s on one core).

    Without, it is one pass in a mixed order that never changes, so that its first batches stand for
    the whole; rows of padding complete the last batch. Process i of n gets rows i·batch_size/n and
    following of the batches that a single process would make, so all processes make equally many.

    Args:
      config: source, tokens per row, packing.
      tokenizer: from `load_tokenizer`.
      split: `"train"` or `"heldout"`.
      process_index: which one of `process_count` processes this is.
      process_count: processes that together make a batch.
      repeat: endless and shuffled, or one pass.

    Raises:
      DataError: the data is empty or unreadable, or there are too few documents for the processes.
    """
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index is {process_index}; must be in [0, {process_count})")
    if config.batch_size % process_count:
        raise DataError(
            f"data.batch_size {config.batch_size} is not a multiple of {process_count} processes"
        )
    source = open_source(config, split)
    if repeat:
        _check_shares(len(source), config, process_count)
    _require_tokens(source, tokenizer, split)
    # Imported here so that the package imports where grain is not installed.
    from megalodon_jax.data import pipeline

    make_batches = pipeline.training_batches if repeat else pipeline.single_pass_batches
    batches = make_batches(
        source, tokenizer, config, process_index=process_index, process_count=process_count
    )
    settings = {
        "split": split, "repeat": repeat, "documents": source.fingerprint(),
        "num_documents": len(source), "tokenizer": tokenizer.fingerprint(),
        "seq_len": config.seq_len, "batch_size": config.batch_size, "packing": config.packing,
        "shuffle_seed": config.shuffle_seed, "num_workers": config.num_workers,
        "process_index": process_index, "process_count": process_count,
    }  # fmt: skip
    return Loader(batches, settings, counts_bytes=not repeat)


def _check_shares(num_documents: int, config: DataConfig, process_count: int) -> None:
    num_readers = process_count * max(1, config.num_workers)
    if num_documents < num_readers:
        raise DataError(
            f"{num_documents} documents cannot be shared by {process_count} processes with "
            f"{config.num_workers} workers each; use fewer, or set data.document_separator"
        )
    if config.num_workers < 0:
        raise DataError(f"data.num_workers is {config.num_workers}; must not be negative")
    if not 0 <= config.shuffle_seed < 2**32:
        raise DataError(f"data.shuffle_seed is {config.shuffle_seed}; must be in [0, 2^32)")


def _require_tokens(source: Source, tokenizer: Tokenizer, split: Split) -> None:
    if not any(len(tokenizer.encode(document.text)) for document in source):
        raise DataError(f"the {len(source)} documents of split {split!r} hold no token at all")
