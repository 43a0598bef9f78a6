"""Batches of a configuration: endless for training, one exact pass for evaluation."""

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
    """An iterator over batches of numpy arrays whose state can be saved and restored exactly.

    `make_loader` makes it. Each data shard that holds rows of this loader is read ahead by a thread
    or by worker processes, which start with the first batch. A loader is not thread-safe.
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
        # Closed at exit at the latest: grain's iterators print an error from `__del__` if they
        # outlive their modules.
        self._finalizer = weakref.finalize(self, _close_all, self._opened)
        self._open(settings["num_shards"])

    def _open(self, num_shards: int) -> None:
        rows_per_shard = self._settings["batch_size"] // num_shards
        needed = sorted({row // rows_per_shard for row in self._rows})
        _close_all(self._opened)
        for index in needed:
            self._opened[index] = iter(self._open_shard(index, num_shards))
        # Indices of the loader's rows in the concatenated rows of the opened shards.
        self._row_indices = [
            needed.index(row // rows_per_shard) * rows_per_shard + row % rows_per_shard
            for row in self._rows
        ]
        self._has_all_rows = len(self._row_indices) == len(needed) * rows_per_shard
        self._initial_states = {index: shard.get_state() for index, shard in self._opened.items()}

    @property
    def _shards(self) -> "dict[int, grain.DatasetIterator[CountedBatch]]":
        if not self._opened:
            raise ValueError("the loader is closed; make a new one with make_loader")
        return self._opened

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch: arrays (rows, seq_len) with the loader's rows of the global batch.

        Raises:
          StopIteration: the single pass has ended (never with `repeat`).
          DataError: a document cannot be read.
        """
        return self._next().batch

    def _next(self) -> CountedBatch:
        shard_batches = [next(shard) for shard in self._shards.values()]
        fields = zip(*(counted.batch for counted in shard_batches), strict=True)
        joined = (arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in fields)
        batch = Batch(*(a if self._has_all_rows else a[self._row_indices] for a in joined))  # type: ignore[arg-type]
        return CountedBatch(batch, sum(counted.num_bytes for counted in shard_batches))

    def with_bytes(self) -> "Iterator[CountedBatch]":
        """The same batches, each with the number of text bytes that its weighted targets encode.

        Bytes are counted over all rows of the global batch. Over complete documents the counts add
        up to their UTF-8 bytes, so bits per byte = total loss in nats / ln 2 / total bytes, with
        the loss of the end-of-document tokens included.

        Raises:
          ValueError: this loader was made with `repeat`; only single passes count bytes.
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
        """Restarts at the first batch."""
        for index, shard in self._shards.items():
            shard.set_state(self._initial_states[index])

    def state_dict(self) -> dict[str, Any]:
        """The loader's state as JSON values: its settings and the position in each data shard.

        Only the data shards of this loader's rows are included; `merge_states` merges the states of
        all loaders of a run.
        """
        positions = {str(index): shard.get_state() for index, shard in self._shards.items()}
        state = {"version": STATE_VERSION, "settings": self._settings, "shards": positions}
        return json.loads(json.dumps(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state: the next batches are bitwise those that followed it.

        The number of data shards is taken from the state unless the configuration sets it. This
        loader may have other rows than the loaders that saved the state.

        Raises:
          DataError: the state was saved with other data or settings (the differing ones are named),
            or a data shard is missing.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(
                f"the loader state has version {state.get('version')!r}, this version reads "
                f"{STATE_VERSION}; use the version of megalodon-flax that saved it"
            )
        saved = state["settings"]
        changes = [
            f"{key} was {saved.get(key)!r} and is {value!r}"
            for key, value in self._settings.items()
            if saved.get(key) != value and not (key == "num_shards" and self._any_num_shards)
        ]
        if changes:
            raise DataError(
                f"cannot resume with changed data: {'; '.join(changes)}; restore the saved "
                "settings, or start a new run from these weights with --init_from"
            )
        if saved["num_shards"] != self._settings["num_shards"]:
            self._settings = {**self._settings, "num_shards": saved["num_shards"]}
            self._open(saved["num_shards"])
        if missing := [str(index) for index in self._shards if str(index) not in state["shards"]]:
            raise DataError(
                f"the loader state lacks data shard {', '.join(missing)} of {saved['num_shards']}; "
                "merge the states of all processes with merge_states"
            )
        for index, shard in self._shards.items():
            shard.set_state(state["shards"][str(index)])

    def close(self) -> None:
        """Stops the read-ahead threads or processes; the loader cannot be used afterwards."""
        self._finalizer()


def _close_all(opened: "dict[int, grain.DatasetIterator[CountedBatch]]") -> None:
    while opened:
        opened.popitem()[1].close()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states of all loaders of a run, saved after the same number of batches.

    Raises:
      DataError: the settings differ, or a data shard has no state.
    """
    settings = states[0]["settings"]
    if any(state["settings"] != settings for state in states):
        raise DataError(
            "the processes load different data; use the same settings and files in all of them"
        )
    shards = {index: position for state in states for index, position in state["shards"].items()}
    if len(shards) != settings["num_shards"]:
        raise DataError(
            f"{len(shards)} of {settings['num_shards']} data shards have a state; pass the states "
            "of all processes"
        )
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
    """Makes the loader of one split.

    With `repeat` it is endless: every epoch reshuffles the documents (`shuffle_seed`), and rows
    within windows of 2^20 tokens. With S data shards, shard s reads every S-th document and fills
    the rows from s·batch_size/S on, so batches do not depend on which process loads which rows. The
    last row of an epoch is padded, so that an epoch has every target exactly once. `num_workers`
    processes help where tokenization is slow (bytes are faster without: 6 to 30 MB/s on one core).

    Without `repeat` it is a single pass in a fixed random order, so that the first batches are
    representative; padding rows complete the last batch. Every loader packs all rows and returns
    its own, so all processes get the same number of batches.

    Args:
      config: source, tokens per row, packing.
      tokenizer: from `load_tokenizer`.
      split: `"train"` or `"heldout"`.
      rows: rows of the global batch that this loader returns, ascending; None: all.
      default_shards: number of data shards if `config.num_shards` is 0.
      repeat: endless and shuffled, or a single pass.

    Raises:
      DataError: the data is empty or unreadable, there are fewer documents than shards, or the
        rows do not divide by them.
    """
    rows = range(config.batch_size) if rows is None else rows
    if not rows or sorted({*rows} & {*range(config.batch_size)}) != list(rows):
        raise DataError(
            f"rows are {list(rows)}; use ascending indices from 0 to {config.batch_size - 1}, the "
            "rows of data.batch_size"
        )
    num_shards = (config.num_shards or default_shards) if repeat else 1
    source = open_source(config, split)
    if repeat:
        _check_shards(len(source), config, num_shards)
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
    # A local import: this package imports without grain.
    from megalodon_jax.data import pipeline

    def open_shard(shard: int, num_shards: int) -> "grain.IterDataset[CountedBatch]":
        if not repeat:
            return pipeline.single_pass_batches(source, tokenizer, config)
        return pipeline.training_batches(
            source, tokenizer, config, shard=shard, num_shards=num_shards
        )

    return open_shard


def _check_shards(num_documents: int, config: DataConfig, num_shards: int) -> None:
    if config.batch_size % num_shards:
        raise DataError(
            f"data.batch_size {config.batch_size} does not divide by {num_shards} data shards; set "
            "data.num_shards to one of its divisors"
        )
    num_readers = num_shards * max(1, config.num_workers)
    if num_documents < num_readers:
        raise DataError(
            f"{num_documents} documents are too few for {num_shards} data shards with "
            f"{config.num_workers} workers each; lower data.num_shards or data.num_workers, or set "
            "data.document_separator"
        )
    if config.num_workers < 0:
        raise DataError(f"data.num_workers is {config.num_workers}; must not be negative")
    if not 0 <= config.shuffle_seed < 2**32:
        raise DataError(f"data.shuffle_seed is {config.shuffle_seed}; must be in [0, 2^32)")


def _require_tokens(source: Source, tokenizer: Tokenizer, split: Split) -> None:
    if not any(len(tokenizer.encode(document.text)) for document in source):
        raise DataError(
            f"the {len(source)} documents of split {split!r} have no token; check the files and "
            "data.text_field"
        )
