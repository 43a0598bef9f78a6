"""Batches from a configuration: endless for training, one exact pass for measuring."""

import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from megalodon_jax.config import DataConfig
from megalodon_jax.data.packing import CountedBatch
from megalodon_jax.data.sources import Source, Split, open_source
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.errors import DataError
from megalodon_jax.typing import Batch

if TYPE_CHECKING:
    import grain

STATE_VERSION = 2


class Loader(Iterator[Batch]):
    """An iterator over batches of numpy arrays that can be saved and restored exactly.

    Made by `make_loader`. Batches are prepared by a thread, or by processes, for each shard that
    has some of the loader's rows; they start with the first batch. A loader must be used by one
    thread at a time.
    """

    def __init__(
        self,
        open_shard: "Callable[[int, int], grain.IterDataset[CountedBatch]]",
        settings: dict[str, Any],
        *,
        rows: Sequence[int],
        counts_bytes: bool,
        any_num_shards: bool,
    ):
        self._open_shard = open_shard
        self._settings = settings
        self._rows = rows
        self._counts_bytes = counts_bytes
        self._any_num_shards = any_num_shards
        self._opened: dict[int, grain.DatasetIterator[CountedBatch]] = {}
        # Closed and dropped at exit at the latest: grain's iterators, closed or not, print an error
        # from `__del__` if they outlive their modules.
        self._finalizer = weakref.finalize(self, _close_all, self._opened)
        self._open(settings["num_shards"])

    def _open(self, num_shards: int) -> None:
        share = self._settings["batch_size"] // num_shards
        needed = sorted({row // share for row in self._rows})
        _close_all(self._opened)
        for index in needed:
            self._opened[index] = iter(self._open_shard(index, num_shards))
        # The loader's rows among those of its shards, laid end to end.
        self._kept = [needed.index(row // share) * share + row % share for row in self._rows]
        self._keeps_all = len(self._kept) == len(needed) * share
        self._start = {index: shard.get_state() for index, shard in self._opened.items()}

    @property
    def _shards(self) -> "dict[int, grain.DatasetIterator[CountedBatch]]":
        if not self._opened:
            raise ValueError("this loader is closed; make a new one")
        return self._opened

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch: (rows, seq_len) arrays, the loader's rows of the global batch.

        Raises:
          StopIteration: the pass is over (never with `repeat`).
          DataError: a document cannot be read.
        """
        return self._next().batch

    def _next(self) -> CountedBatch:
        parts = [next(shard) for shard in self._shards.values()]
        arrays = zip(*(part.batch for part in parts), strict=True)
        joined = (same[0] if len(same) == 1 else np.concatenate(same) for same in arrays)
        batch = Batch(*(array if self._keeps_all else array[self._kept] for array in joined))  # type: ignore[arg-type]
        return CountedBatch(batch, sum(part.num_bytes for part in parts))

    def with_bytes(self) -> "Iterator[CountedBatch]":
        """The same batches, each with the bytes of text that its weighted targets stand for.

        The count is over all rows of the global batch. Over complete documents the counts add
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
        while True:
            try:
                counted = self._next()
            except StopIteration:
                return
            yield counted

    def rewind(self) -> None:
        """Goes back to the first batch."""
        for index, shard in self._shards.items():
            shard.set_state(self._start[index])

    def state_dict(self) -> dict[str, Any]:
        """Where this loader is, as JSON values: its settings, and the position of each shard.

        It holds the shards that have some of the loader's rows; `merge_states` joins the states of
        loaders that have the others.
        """
        positions = {str(index): shard.get_state() for index, shard in self._shards.items()}
        state = {"version": STATE_VERSION, "settings": self._settings, "shards": positions}
        return json.loads(json.dumps(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state: the following batches are bitwise those that followed it.

        The number of shards becomes that of the state, unless the configuration names one. The rows
        of the loader may be others than those of the loaders that saved it.

        Raises:
          DataError: the state was saved with other data or settings (those that differ are named),
            or lacks a shard.
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
            if saved.get(key) != value and not (key == "num_shards" and self._any_num_shards)
        ]
        if changes:
            raise DataError(f"cannot continue in changed data: {'; '.join(changes)}")
        if saved["num_shards"] != self._settings["num_shards"]:
            self._settings = {**self._settings, "num_shards": saved["num_shards"]}
            self._open(saved["num_shards"])
        if missing := [str(index) for index in self._shards if str(index) not in state["shards"]]:
            raise DataError(
                f"the data state lacks shard {', '.join(missing)} of {saved['num_shards']}; join "
                "the states of all processes with merge_states"
            )
        for index, shard in self._shards.items():
            shard.set_state(state["shards"][str(index)])

    def close(self) -> None:
        """Stops the thread or the processes that prepare batches; the loader is of no use then."""
        self._finalizer()


def _close_all(opened: "dict[int, grain.DatasetIterator[CountedBatch]]") -> None:
    while opened:
        opened.popitem()[1].close()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from those of several loaders of a run, taken after the same number of batches.

    Raises:
      DataError: they are of different runs, or together lack a shard.
    """
    settings = states[0]["settings"]
    if any(state["settings"] != settings for state in states):
        raise DataError("the processes load different data; give all the same settings and files")
    shards = {index: position for state in states for index, position in state["shards"].items()}
    if len(shards) != settings["num_shards"]:
        raise DataError(f"{len(shards)} of {settings['num_shards']} shards have a state; all must")
    return {"version": STATE_VERSION, "settings": settings, "shards": shards}


def make_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: Split,
    *,
    rows: Sequence[int] | None = None,
    default_shards: int = 1,
    repeat: bool,
) -> Loader:
    """Makes the loader of one side of the data.

    With `repeat` it never ends: every epoch has a new order of documents (`shuffle_seed`), and of
    rows within windows of 2^20 tokens. Of S shards, shard s reads every S-th document and makes
    rows s·batch_size/S and following, so batches do not depend on who loads which rows. An epoch's
    last row is padded, so that it has every target exactly once. `num_workers` processes help where
    tokenization is slow (bytes are faster without: 6 to 30 MB/s on one core).

    Without, it is one pass in a mixed order that never changes, so that its first batches stand for
    the whole; rows of padding complete the last batch. Every loader packs all rows and keeps its
    own, so all processes make equally many batches.

    Args:
      config: source, tokens per row, packing.
      tokenizer: from `load_tokenizer`.
      split: `"train"` or `"heldout"`.
      rows: which rows of the global batch this loader gives, rising; None: all.
      default_shards: shards if `config.num_shards` is 0.
      repeat: endless and shuffled, or one pass.

    Raises:
      DataError: the data is empty or unreadable, there are too few documents for the shards, or
        rows cannot be dealt out to them.
    """
    rows = range(config.batch_size) if rows is None else rows
    if not rows or sorted({*rows} & {*range(config.batch_size)}) != list(rows):
        raise DataError(
            f"rows are {list(rows)}; must be some of 0 to {config.batch_size - 1}, rising, for "
            "these are the rows of data.batch_size"
        )
    num_shards = (config.num_shards or default_shards) if repeat else 1
    source = open_source(config, split)
    if repeat:
        _check_shares(len(source), config, num_shards)
    _require_tokens(source, tokenizer, split)
    settings = {
        "split": split, "repeat": repeat, "documents": source.fingerprint(),
        "num_documents": len(source), "tokenizer": tokenizer.fingerprint(),
        "seq_len": config.seq_len, "batch_size": config.batch_size, "packing": config.packing,
        "shuffle_seed": config.shuffle_seed, "num_workers": config.num_workers,
        "num_shards": num_shards,
    }  # fmt: skip
    return Loader(
        _shard_opener(source, tokenizer, config, repeat=repeat),
        settings,
        rows=rows,
        counts_bytes=not repeat,
        any_num_shards=repeat and config.num_shards == 0,
    )


def _shard_opener(
    source: Source, tokenizer: Tokenizer, config: DataConfig, *, repeat: bool
) -> "Callable[[int, int], grain.IterDataset[CountedBatch]]":
    # Imported here so that the package imports where grain is not installed.
    from megalodon_jax.data import pipeline

    def open_shard(shard: int, num_shards: int) -> "grain.IterDataset[CountedBatch]":
        if not repeat:
            return pipeline.single_pass_batches(source, tokenizer, config)
        return pipeline.training_batches(
            source, tokenizer, config, shard=shard, num_shards=num_shards
        )

    return open_shard


def _check_shares(num_documents: int, config: DataConfig, num_shards: int) -> None:
    if config.batch_size % num_shards:
        raise DataError(
            f"data.batch_size {config.batch_size} does not divide by {num_shards} shards; set "
            "data.num_shards to one of its divisors"
        )
    num_readers = num_shards * max(1, config.num_workers)
    if num_documents < num_readers:
        raise DataError(
            f"{num_documents} documents cannot be shared by {num_shards} shards with "
            f"{config.num_workers} workers each; lower data.num_shards or data.num_workers, or set "
            "data.document_separator"
        )
    if config.num_workers < 0:
        raise DataError(f"data.num_workers is {config.num_workers}; must not be negative")
    if not 0 <= config.shuffle_seed < 2**32:
        raise DataError(f"data.shuffle_seed is {config.shuffle_seed}; must be in [0, 2^32)")


def _require_tokens(source: Source, tokenizer: Tokenizer, split: Split) -> None:
    if not any(len(tokenizer.encode(document.text)) for document in source):
        raise DataError(f"the {len(source)} documents of split {split!r} hold no token at all")
