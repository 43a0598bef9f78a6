"""Configuration of the data: text sources, tokenizer, packing."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megalodon_jax.config.checks import Rule, check
from megalodon_jax.config.ranges import Content, Interval, Range, Rate, Seed, Size, Text

RULES = (
    Rule(
        lambda c: c.source != "files" or bool(c.files),
        "data.source is 'files' but data.files is empty; name at least one path or glob",
    ),
    Rule(
        lambda c: c.source != "tfds" or bool(c.tfds_name),
        "data.source is 'tfds' but data.tfds_name is empty; name a prepared data set",
    ),
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text sources, tokenizer, and packing into rows."""

    source: Literal["python_stdlib", "files", "tfds"] = "python_stdlib"
    """Text source: the Python standard library's code, files, or a prepared TFDS data set."""
    files: tuple[str, ...] = ()
    """Paths or globs of training files: plain text, .gz, .jsonl, .parquet (source `files`)."""
    heldout_files: tuple[str, ...] = ()
    """Paths or globs of held-out files; if empty, `heldout_fraction` applies."""
    heldout_fraction: Rate = 0.05
    """Fraction of documents held out from training, selected by a hash of the document's name."""
    text_field: Annotated[str, Text(may_be_empty=False)] = "text"
    """Field with the text in .jsonl and .parquet files and in TFDS examples."""
    document_separator: Content = ""
    """Separator of documents in plain text files, such as "\\u0000"; empty: one per file."""
    tfds_name: str = ""
    """Name of the TFDS data set, with config and version if needed."""
    tfds_dir: str = ""
    """Directory of prepared TFDS data sets; nothing is downloaded."""
    tfds_split: str = "train"
    """TFDS split for training."""
    tfds_heldout_split: str = "validation"
    """TFDS split for held-out evaluation."""
    tokenizer: Annotated[str, Text(may_be_empty=False)] = "bytes"
    """`bytes`, or the path of a `tokenizer.json` (tokenizers) or `.model` (sentencepiece) file."""
    seq_len: Annotated[int, Range(low=2, high=2_000_000_000)] = 1024
    """Tokens per row."""
    batch_size: Size = 8
    """Rows of a global batch, over all devices."""
    packing: Literal["pack", "pad"] = "pack"
    """Pack several documents into a row as segments, or pad rows that hold one document."""
    shuffle_seed: Seed = 0
    """Seed of the document order."""
    num_shards: Interval = 0
    """Data shards: groups of training documents, each of which fills its own rows of every batch.
    Batches depend on this number, not on the number of processes. 0: the number of processes that
    load different rows when the run starts; a resumed run keeps the number."""
    num_workers: Annotated[int, Range(low=0, high=10_000)] = 0
    """Worker processes that read and tokenize each data shard; 0: a thread of the main process."""

    def __post_init__(self) -> None:
        check(self, "data", RULES)
