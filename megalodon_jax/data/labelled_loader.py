"""Loaders of labelled examples: order, shards, packing and resumption are those of texts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megalodon_jax.config import DataConfig
from megalodon_jax.data.checks import check_shards
from megalodon_jax.data.documents import Slice
from megalodon_jax.data.labelled import ExampleSet, LabelledFormat
from megalodon_jax.data.loader import Loader
from megalodon_jax.data.reader import ReadOptions
from megalodon_jax.data.tokenizer import ByteTokenizer
from megalodon_jax.errors import DataError

if TYPE_CHECKING:
    import grain

    from megalodon_jax.data.packing import PackedRows


def make_labelled_loader(
    examples: ExampleSet,
    layout: LabelledFormat,
    config: DataConfig,
    *,
    rows: Sequence[int],
    default_shards: int = 1,
    repeat: bool,
) -> Loader:
    """The loader of a set of examples, as `make_loader` makes those of texts.

    Args:
      examples: the set.
      layout: how examples are laid in rows.
      config: rows, packing, seed of the order, workers.
      rows: rows of the global batch that this loader returns, ascending.
      default_shards: number of data shards if `config.num_shards` is 0.
      repeat: endless and shuffled, or a single pass.

    Raises:
      DataError: there are no examples, or fewer than shards.
    """
    if len(examples) == 0:
        raise DataError("the set has no examples; check examples.path")
    num_shards = (config.num_shards or default_shards) if repeat else 1
    if repeat:
        check_shards(examples, config, num_shards)
    settings = {
        "repeat": repeat, "documents": examples.fingerprint(), "num_documents": len(examples),
        "seq_len": config.seq_len, "batch_size": config.batch_size, "packing": config.packing,
        "shuffle_seed": config.shuffle_seed,
        "num_readers": max(1, config.num_workers) if repeat else 1,
        "num_shards": num_shards, "examples": layout.settings(),
    }  # fmt: skip
    if examples.repeats > 1:
        settings["repeats"] = examples.repeats
    # Tokens by the memory that they take: a token of values has several numbers.
    row_size = config.seq_len * max(1, layout.value_size)
    shuffles = repeat and examples.repeats == 1
    options = ReadOptions(
        tokenizer=ByteTokenizer(),
        seq_len=config.seq_len,
        packing=config.packing,
        count_bytes=False,
        on_bad_document=config.on_bad_document,
        examples=layout,
    )

    def open_reader(
        *, shard: int, num_shards: int, reader: int, num_readers: int, state: str | None
    ) -> "grain.IterDataset[PackedRows]":
        # A local import: this package imports without grain.
        from megalodon_jax.data import pipeline

        num_rows = config.batch_size // num_shards
        batches = pipeline.BatchDataset(
            [pipeline.MixedSource(examples, 1.0, epochs=0 if repeat else 1)],
            options,
            num_rows=num_rows,
            # A window would move the repeats of an example apart.
            window=max(1, pipeline.WINDOW_TOKENS // row_size) if shuffles else 1,
            document_seed=config.shuffle_seed if repeat else pipeline.SINGLE_PASS_SEED,
            row_seed=config.shuffle_seed,
            part=Slice(shard + num_shards * reader, num_shards * num_readers),
            interleave=False,
            state=state,
        )
        return pipeline.prefetched(
            batches,
            tokens_per_batch=num_rows * row_size,
            in_process=repeat and config.num_workers > 0,
        )

    return Loader(
        open_reader,
        settings,
        rows=rows,
        source_names=[""],
        counts_bytes=not repeat,
        any_num_shards=repeat and config.num_shards == 0,
    )
