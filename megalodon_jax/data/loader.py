"""Batches of a configuration: endless for training, one exact pass for evaluation."""

import functools
import json
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from megalodon_jax.config import DataConfig, MixtureSource, TextSource
from megalodon_jax.data.checks import check_shards, require_tokens, require_whole_records
from megalodon_jax.data.data_shard import POSITION_KEYS, DataShard
from megalodon_jax.data.documents import Slice
from megalodon_jax.data.examples import ExampleFormat
from megalodon_jax.data.huggingface import StreamedSource
from megalodon_jax.data.open_source import open_any_source, training_sources
from megalodon_jax.data.packing import Counts
from megalodon_jax.data.reader import ReadOptions
from megalodon_jax.data.sources import Source
from megalodon_jax.data.splits import Split
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.errors import DataError
from megalodon_jax.typing import Batch, CountedBatch

if TYPE_CHECKING:
    import grain

    from megalodon_jax.data import pipeline
    from megalodon_jax.data.packing import PackedRows

STATE_VERSION = 3


class OpenReader(Protocol):
    """Opens a reader: one of the threads or processes that read a data shard."""

    def __call__(
        self, *, shard: int, num_shards: int, reader: int, num_readers: int, state: str | None
    ) -> "grain.IterDataset[PackedRows]":
        """The reader's batches after a position; None: from the first."""
        ...


class Loader(Iterator[Batch]):
    """An iterator over batches of numpy arrays whose state can be saved and restored exactly.

    `make_loader` makes it. Each data shard that holds rows of this loader is read ahead by a thread
    or by worker processes, which start with the first batch. A loader is not thread-safe.
    """

    def __init__(
        self,
        open_reader: OpenReader,
        settings: dict[str, Any],
        *,
        rows: Sequence[int],
        source_names: Sequence[str],
        counts_bytes: bool,
        any_num_shards: bool,
    ):
        self._open_reader = open_reader
        self._settings = settings
        self._rows = rows
        self._source_names = tuple(source_names)
        self._counts_bytes = counts_bytes
        self._any_num_shards = any_num_shards
        self._opened: dict[int, DataShard] = {}
        # Closed at exit at the latest: grain's iterators print an error from `__del__` if they
        # outlive their modules.
        self._finalizer = weakref.finalize(self, _close_unused, self._opened)
        self._open(None)

    def _open(self, positions: Mapping[str, Any] | None) -> None:
        """Opens the data shards of this loader's rows at their positions."""
        num_shards = self._settings["num_shards"]
        rows_per_shard = self._settings["batch_size"] // num_shards
        needed = sorted({row // rows_per_shard for row in self._rows})
        _close_all(self._opened)
        for index in needed:
            self._opened[index] = DataShard(
                functools.partial(self._open_reader, shard=index, num_shards=num_shards),
                num_readers=self._settings["num_readers"],
                num_sources=len(self._source_names),
                position=None if positions is None else positions[str(index)],
            )
        # Indices of the loader's rows in the concatenated rows of the opened shards.
        self._row_indices = [
            needed.index(row // rows_per_shard) * rows_per_shard + row % rows_per_shard
            for row in self._rows
        ]
        self._has_all_rows = len(self._row_indices) == len(needed) * rows_per_shard

    @property
    def _shards(self) -> "dict[int, DataShard]":
        if not self._opened:
            raise ValueError("the loader is closed; make a new one with make_loader")
        return self._opened

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch: arrays (rows, seq_len) with the loader's rows of the global batch.

        Raises:
          StopIteration: the single pass has ended (never with `repeat`).
          DataError: a document cannot be read, or every source has had all its epochs.
        """
        return self._next().batch

    def _next(self) -> CountedBatch:
        try:
            packed = [next(shard) for shard in self._shards.values()]
        except StopIteration:
            if not self._settings["repeat"]:
                raise
            raise DataError(
                "all sources have been read as often as their `epochs` say; raise them, or lower "
                "`steps`"
            ) from None
        fields = zip(*(shard.batch for shard in packed), strict=True)
        joined = (arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in fields)
        batch = Batch(*(a if self._has_all_rows else a[self._row_indices] for a in joined))  # type: ignore[arg-type]
        return CountedBatch(batch, sum(shard.num_bytes for shard in packed))

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
        for shard in self._shards.values():
            shard.rewind()

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources of a mixture, as `counts` numbers them; one "" without."""
        return self._source_names

    def counts(self) -> dict[str, list[list[int]]]:
        """Counts of the batches so far, by data shard and source, as JSON values.

        Every entry is a `Counts`: tokens, documents, bad documents. `total_counts` adds up those of
        all processes.
        """
        return {str(index): shard.counts.tolist() for index, shard in self._shards.items()}

    @property
    def bad_documents(self) -> int:
        """Documents in this loader's data shards that were left out since the run's first step."""
        return sum(counts.bad_documents for counts in total_counts([self.counts()]))

    def state_dict(self) -> dict[str, Any]:
        """The loader's state as JSON values: its settings and the position in each data shard.

        Only the data shards of this loader's rows are included; `merge_states` merges the states of
        all loaders of a run.
        """
        positions = {str(index): shard.position() for index, shard in self._shards.items()}
        state = {"version": STATE_VERSION, "settings": self._settings, "shards": positions}
        return json.loads(json.dumps(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state: the next batches are bitwise those that followed it.

        The numbers of data shards and of their readers are taken from the state, unless the
        configuration sets the former. This loader may have other rows than the loaders that saved
        the state.

        Raises:
          DataError: the state is malformed or was saved with other data or settings (the differing
            ones are named), or a data shard is missing.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(
                f"the loader state has version {state.get('version')!r}, this version reads "
                f"{STATE_VERSION}; use the version of megalodon-flax that saved it"
            )
        _check_keys("the loader state", state, {"version", "settings", "shards"})
        saved = state["settings"]
        _check_keys("the settings of the loader state", saved, set(self._settings))
        own = json.loads(json.dumps(self._settings))
        changes = [
            f"{key} was {saved[key]!r} and is {value!r}"
            for key, value in own.items()
            if saved[key] != value
            and key != "num_readers"
            and not (key == "num_shards" and self._any_num_shards)
        ]
        if changes:
            raise DataError(
                f"cannot resume with changed data: {'; '.join(changes)}; restore the saved "
                "settings, or start a new run from these weights with --init_from"
            )
        shards = state["shards"]
        rows_per_shard = saved["batch_size"] // saved["num_shards"]
        needed = {str(row // rows_per_shard) for row in self._rows}
        if missing := sorted(needed - set(shards)):
            raise DataError(
                f"the loader state lacks data shard {', '.join(missing)} of {saved['num_shards']}; "
                "merge the states of all processes with merge_states"
            )
        for index in needed:
            _check_keys(f"data shard {index} of the loader state", shards[index], POSITION_KEYS)
        self._settings = dict(saved)
        self._open(shards)

    def close(self) -> None:
        """Stops the read-ahead threads or processes; the loader cannot be used afterwards."""
        self._finalizer.detach()
        _close_all(self._opened)


def _close_all(opened: dict[int, DataShard]) -> None:
    while opened:
        opened.popitem()[1].close()


def _close_unused(opened: dict[int, DataShard]) -> None:
    """Closes the data shards of a loader that was collected as garbage, or at exit."""
    if threading.current_thread() is threading.main_thread():
        _close_all(opened)
    else:
        # The garbage collector also runs on read-ahead threads, which cannot wait for their own
        # end.
        threading.Thread(target=_close_all, args=(opened,), daemon=True).start()


def _check_keys(where: str, table: Mapping[str, Any], expected: Collection[str]) -> None:
    if unknown := sorted(set(table) - set(expected)):
        raise DataError(f"{where} has unknown keys: {', '.join(unknown)}; it may be damaged")
    if missing := sorted(set(expected) - set(table)):
        raise DataError(f"{where} lacks {', '.join(missing)}; it may be damaged")


def total_counts(counts: Sequence[Mapping[str, Sequence[Sequence[int]]]]) -> list[Counts]:
    """The counts of every source in a run.

    Args:
      counts: `Loader.counts` of all processes, of which several may hold the same data shard.
    """
    shards = {index: entry for process in counts for index, entry in process.items()}
    return [Counts(*row) for row in np.sum([*shards.values()], axis=0, dtype=np.int64).tolist()]


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
    name: str = "",
    examples: ExampleFormat | None = None,
) -> Loader:
    """Makes the loader of one split.

    With `repeat` it is endless: every epoch reshuffles the documents (`shuffle_seed`), reads 16 of
    them side by side (`interleaved`), and shuffles rows within windows of 2^20 tokens. With S data
    shards, shard s reads every S-th document and fills the rows from s·batch_size/S on, so batches
    do not depend on which process loads which rows. The last row of an epoch is padded, so that an
    epoch has every target exactly once. `num_workers` processes help where tokenization is slow
    (bytes are faster without: 6 to 30 MB/s on one core). With `config.sources`, rows of all sources
    are mixed by their weights. With `config.carry_state` a row continues the same row of the batch
    before (`streams`): its documents keep their order.

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
      name: which of the held-out sets, see `heldout_names`.
      examples: how records become examples of a prompt and a response, which are packed whole; the
        weights are 1 at targets of responses. None: documents are running text.

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
    entries = training_sources(config) if split == "train" else ()
    names = [getattr(entry, "name", "") for entry in entries] or [name]
    sources = [open_any_source(config, split, name=entry) for entry in names]
    if examples is not None:
        require_whole_records(sources)
    if repeat:
        for source in sources:
            check_shards(source, config, num_shards)
    for source in sources:
        require_tokens(source, tokenizer, split, on_bad_document=config.on_bad_document)
    settings = {
        "split": split, "repeat": repeat, **_data_settings(sources, entries),
        "tokenizer": tokenizer.fingerprint(), "seq_len": config.seq_len,
        "batch_size": config.batch_size,
        # One text: checkpoints of versions without carry_state have no setting of its name.
        "packing": config.packing + (", carry_state" if repeat and config.carry_state else ""),
        "shuffle_seed": config.shuffle_seed,
        "num_readers": max(1, config.num_workers) if repeat else 1,
        "num_shards": num_shards,
        **({} if examples is None else {"examples": examples.settings()}),
    }  # fmt: skip
    return Loader(
        _reader_opener(sources, entries, tokenizer, config, repeat=repeat, examples=examples),
        settings,
        rows=rows,
        source_names=names,
        counts_bytes=not repeat,
        any_num_shards=repeat and config.num_shards == 0,
    )


def _data_settings(
    sources: Sequence[Source | StreamedSource], entries: Sequence[TextSource]
) -> dict[str, Any]:
    """The settings that a resumed run must share with the saved one."""
    prints = [source.fingerprint() for source in sources]
    sizes = [len(source) if isinstance(source, Source) else None for source in sources]
    mixture = [entry for entry in entries if isinstance(entry, MixtureSource)]
    if not mixture:
        return {"documents": prints[0], "num_documents": sizes[0]}
    return {
        "documents": prints,
        "num_documents": sizes,
        "sources": [entry.name for entry in mixture],
        "weights": [entry.weight for entry in mixture],
        "epochs": [entry.epochs for entry in mixture],
    }


def _reader_opener(
    sources: Sequence[Source | StreamedSource],
    entries: Sequence[TextSource],
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    repeat: bool,
    examples: ExampleFormat | None,
) -> OpenReader:
    # A local import: this package imports without grain.
    from megalodon_jax.data import pipeline, streams

    options = ReadOptions(
        tokenizer=tokenizer,
        seq_len=config.seq_len,
        packing=config.packing,
        count_bytes=not repeat,
        on_bad_document=config.on_bad_document,
        examples=examples,
        carry_state=repeat and config.carry_state,
    )
    open_batches: "Callable[..., grain.IterDataset[PackedRows]]"
    if options.carry_state:
        open_batches = functools.partial(
            streams.StreamDataset, sources[0], options, seed=config.shuffle_seed
        )
    else:
        open_batches = functools.partial(
            pipeline.BatchDataset,
            _mixed_sources(sources, entries, repeat=repeat),
            options,
            window=max(1, pipeline.WINDOW_TOKENS // config.seq_len) if repeat else 1,
            document_seed=config.shuffle_seed if repeat else pipeline.SINGLE_PASS_SEED,
            row_seed=config.shuffle_seed,
            interleave=repeat,
        )

    def open_reader(
        *, shard: int, num_shards: int, reader: int, num_readers: int, state: str | None
    ) -> "grain.IterDataset[PackedRows]":
        num_rows = config.batch_size // num_shards
        part = Slice(shard + num_shards * reader, num_shards * num_readers)
        return pipeline.prefetched(
            open_batches(num_rows=num_rows, part=part, state=state),
            tokens_per_batch=num_rows * config.seq_len,
            in_process=repeat and config.num_workers > 0,
        )

    return open_reader


def _mixed_sources(
    sources: Sequence[Source | StreamedSource], entries: Sequence[TextSource], *, repeat: bool
) -> "list[pipeline.MixedSource]":
    from megalodon_jax.data import pipeline

    mixture = [entry if isinstance(entry, MixtureSource) else None for entry in entries]
    mixture = mixture or [None] * len(sources)
    return [
        pipeline.MixedSource(
            source,
            weight=entry.weight if entry else 1.0,
            epochs=1 if not repeat else entry.epochs if entry else 0,
        )
        for source, entry in zip(sources, mixture, strict=True)
    ]
