"""Configuration of the data: text sources, tokenizer, packing."""

from dataclasses import dataclass
from typing import Literal

from megalodon_jax.config.checks import check_literals, require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text sources, tokenizer, and packing into rows."""

    source: Literal["python_stdlib", "files", "tfds"] = "python_stdlib"
    """Text source: the Python standard library's code, files, or a prepared TFDS data set."""
    files: tuple[str, ...] = ()
    """Paths or globs of training files: plain text, .gz, .jsonl, .parquet (source `files`)."""
    heldout_files: tuple[str, ...] = ()
    """Paths or globs of held-out files; if empty, `heldout_fraction` applies."""
    heldout_fraction: float = 0.05
    """Fraction of documents held out from training, selected by a hash of the document's name."""
    text_field: str = "text"
    """Field with the text in .jsonl and .parquet files and in TFDS examples."""
    document_separator: str = ""
    """Separator of documents in plain text files, such as "\\u0000"; empty: one per file."""
    tfds_name: str = ""
    """Name of the TFDS data set, with config and version if needed."""
    tfds_dir: str = ""
    """Directory of prepared TFDS data sets; nothing is downloaded."""
    tfds_split: str = "train"
    """TFDS split for training."""
    tfds_heldout_split: str = "validation"
    """TFDS split for held-out evaluation."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a `tokenizer.json` (tokenizers) or `.model` (sentencepiece) file."""
    seq_len: int = 1024
    """Tokens per row."""
    batch_size: int = 8
    """Rows of a global batch, over all devices."""
    packing: Literal["pack", "pad"] = "pack"
    """Pack several documents into a row as segments, or pad rows that hold one document."""
    shuffle_seed: int = 0
    """Seed of the document order."""
    num_shards: int = 0
    """Data shards: groups of training documents, each of which fills its own rows of every batch.
    Batches depend on this number, not on the number of processes. 0: the number of processes that
    load different rows when the run starts; a resumed run keeps the number."""
    num_workers: int = 0
    """Worker processes that read and tokenize each data shard; 0: a thread of the main process."""

    def __post_init__(self) -> None:
        check_literals(self, "data")
        require(self.seq_len >= 2, f"data.seq_len is {self.seq_len}; must be at least 2")
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
