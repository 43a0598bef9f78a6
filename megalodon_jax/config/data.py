"""Where text comes from and how it becomes rows of tokens."""

from dataclasses import dataclass
from typing import Literal

from megalodon_jax.config.checks import check_literals, require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    source: Literal["python_stdlib", "files", "tfds"] = "python_stdlib"
    """The Python standard library's own source text, text files, or a prepared TFDS data set."""
    files: tuple[str, ...] = ()
    """Paths or globs of training text: plain, .gz, .jsonl, .parquet (source `files`)."""
    heldout_files: tuple[str, ...] = ()
    """Paths or globs of held-out text; if empty, documents are split off by `heldout_fraction`."""
    heldout_fraction: float = 0.05
    """Fraction of documents kept out of training, chosen by a hash of each document's name."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet files and in TFDS examples."""
    document_separator: str = ""
    """Splits a plain text file into documents, such as "\\u0000"; empty: a file is a document."""
    tfds_name: str = ""
    """Name of the TFDS data set, with its config and version if needed."""
    tfds_dir: str = ""
    """Directory of prepared TFDS data sets; nothing is ever downloaded."""
    tfds_split: str = "train"
    """TFDS split to train on."""
    tfds_heldout_split: str = "validation"
    """TFDS split held out."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a `tokenizer.json` (tokenizers) or `.model` (sentencepiece) file."""
    seq_len: int = 1024
    """Tokens in a row."""
    batch_size: int = 8
    """Rows in a batch, over all devices."""
    packing: Literal["pack", "pad"] = "pack"
    """Pack documents into full rows, each its own segment; or one piece of a document a row."""
    shuffle_seed: int = 0
    """Seed of the order of documents."""
    num_shards: int = 0
    """Parts that the documents of training are dealt out to, each with its own rows of every batch.
    Batches depend on it, not on the processes that load them. 0: as many as there are processes
    with rows of their own when the run starts; a resumed run keeps its number."""
    num_workers: int = 0
    """Processes that read and tokenize a shard beside the main one."""

    def __post_init__(self) -> None:
        check_literals(self, "data")
        require(self.seq_len >= 2, f"data.seq_len is {self.seq_len}; a row needs at least 2 tokens")
        require(self.batch_size >= 1, f"data.batch_size is {self.batch_size}; must be at least 1")
        require(self.num_shards >= 0, f"data.num_shards is {self.num_shards}; must not be negative")
        require(
            0.0 <= self.heldout_fraction < 1.0,
            f"data.heldout_fraction is {self.heldout_fraction}; must be in [0, 1)",
        )
        require(
            self.source != "files" or bool(self.files),
            "data.source is 'files' but data.files is empty; name at least one path or glob",
        )
        require(
            self.source != "tfds" or bool(self.tfds_name),
            "data.source is 'tfds' but data.tfds_name is empty; name a prepared data set",
        )
