"""Configuration of the data: text sources, held-out sets, tokenizer, packing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from megalodon_jax.config.checks import Rule, check
from megalodon_jax.config.ranges import (
    Content,
    Interval,
    Range,
    Rate,
    RequiredLocation,
    Seed,
    Size,
    Text,
)

SourceKind = Literal["python_stdlib", "files", "tfds", "hf"]


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where documents come from."""

    source: Literal["auto", "python_stdlib", "files", "tfds", "hf"] = "auto"
    """Text source: the Python standard library's code, files, a prepared TFDS data set, or a
    Hugging Face data set on disk; `auto`: the one whose settings are given, else the library."""
    files: tuple[str, ...] = ()
    """Paths, folders, globs or URLs (gs://, s3://, also with globs) of files: plain text, .jsonl
    (also .gz, .zst), .parquet, .array_record (local only)."""
    text_field: Annotated[str, Text(may_be_empty=False)] = "text"
    """Field with the text in .jsonl, .parquet and JSON records, and in TFDS and Hugging Face
    examples."""
    document_separator: Content = ""
    """Separator of documents in plain text files, such as "\\u0000"; empty: one per file."""
    tfds_name: str = ""
    """Name of the TFDS data set, with config and version if needed."""
    tfds_dir: str = ""
    """Directory of prepared TFDS data sets; nothing is downloaded."""
    tfds_split: str = "train"
    """TFDS split for training."""
    hf_path: str = ""
    """Folder that the Hugging Face `datasets` library saved (`save_to_disk`); with `hf_streaming`
    the name of its loader, such as `json` or `parquet`, that reads `files`."""
    hf_split: str = "train"
    """Split of the Hugging Face data set."""
    hf_streaming: bool = False
    """Read `files` in their order with `datasets.load_dataset(..., streaming=True)`."""

    @property
    def kind(self) -> SourceKind:
        """The source; `auto` is resolved."""
        if self.source != "auto":
            return self.source
        if self.tfds_name:
            return "tfds"
        if self.hf_path:
            return "hf"
        return "files" if self.files else "python_stdlib"


@dataclass(frozen=True, kw_only=True)
class MixtureSource(TextSource):
    """One source of a mixture, a table `[[data.sources]]`."""

    name: str
    """Name in the metrics: letters, digits, '_', '-' and '.'."""
    weight: Annotated[float, Range(low=0.0, open_low=True)] = 1.0
    """Share of the training tokens, relative to the weights of the other sources."""
    epochs: Interval = 0
    """Passes over the source, after which the others go on without it; 0: no limit."""

    def __post_init__(self) -> None:
        _check_named_source(self, "data.sources")


@dataclass(frozen=True, kw_only=True)
class HeldoutSet(TextSource):
    """One named held-out set, a table `[[data.heldout_sets]]`; nothing of it is trained on."""

    name: str
    """Name in the metrics: letters, digits, '_', '-' and '.'."""

    def __post_init__(self) -> None:
        _check_named_source(self, "data.heldout_sets")


def _check_named_source(source: MixtureSource | HeldoutSet, table: str) -> None:
    named = Rule(
        lambda c: _is_name(c.name),
        f"the name {{c.name!r}} in [[{table}]] has other characters than letters, digits, '_', "
        "'-' and '.', or none",
    )
    table = f"{table} {source.name!r}"
    check(source, table, (named, *_source_rules(table)))


@dataclass(frozen=True, kw_only=True)
class DataConfig(TextSource):
    """Text sources, tokenizer, and packing into rows."""

    sources: tuple[MixtureSource, ...] = ()
    """Sources of a mixture, tables `[[data.sources]]` with a name, a weight and the settings of a
    source; they replace the source of this table."""
    heldout_files: tuple[str, ...] = ()
    """Paths, folders, globs or URLs of held-out files; if empty, `heldout_fraction` applies."""
    heldout_sets: tuple[HeldoutSet, ...] = ()
    """Named held-out sets, tables `[[data.heldout_sets]]` with a name and the settings of a source;
    each has a loss of its own in the metrics."""
    heldout_fraction: Rate = 0.05
    """Fraction of documents held out from training, selected by a hash of the document's name."""
    tfds_heldout_split: str = "validation"
    """TFDS split for held-out evaluation."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """A document that cannot be read: save and stop, or leave it out and count it in the
    metrics."""
    tokenizer: RequiredLocation = "bytes"
    """`bytes`, or the path or URL of a `tokenizer.json` (tokenizers) or `.model` (sentencepiece)
    file. A run keeps a copy, which is used where this file no longer exists."""
    seq_len: Annotated[int, Range(low=2, high=2_000_000_000)] = 1024
    """Tokens per row."""
    batch_size: Size = 8
    """Rows of a global batch, over all devices."""
    packing: Literal["pack", "pad"] = "pack"
    """Pack several documents into a row as segments, or pad rows that hold one document."""
    carry_state: bool = False
    """Documents that are longer than a row go on in the same row of the next batch, with the
    model's state at the end of the row; gradients stop there. Rows of training only."""
    shuffle_seed: Seed = 0
    """Seed of the document order."""
    num_shards: Interval = 0
    """Data shards: groups of training documents, each of which fills its own rows of every batch.
    Batches depend on this number, not on the number of processes. 0: the number of processes that
    load different rows when the run starts; a resumed run keeps the number."""
    num_workers: Annotated[int, Range(low=0, high=10_000)] = 0
    """Worker processes that read and tokenize each data shard; 0: a thread of the main process.
    Batches depend on the number; a resumed run keeps that of its start, in processes or threads."""

    def __post_init__(self) -> None:
        source_rules = () if self.sources else _source_rules("data")
        check(self, "data", (*source_rules, *_RULES))


_RULES = (
    Rule(
        lambda c: not c.sources or c.kind == "python_stdlib",
        "data has both a source of its own and [[data.sources]]; put it into a table "
        "[[data.sources]] of its own",
    ),
    Rule(
        lambda c: not (c.heldout_files and c.heldout_sets),
        "data.heldout_files and [[data.heldout_sets]] are both set; make the files a set too",
    ),
    Rule(
        lambda c: not (c.carry_state and c.sources),
        "data.carry_state is set with [[data.sources]], whose rows do not follow each other; use "
        "one source, or carry_state = false",
    ),
    Rule(
        lambda c: not (c.carry_state and c.num_workers > 1),
        "data.carry_state is set with data.num_workers = {c.num_workers}, which read "
        "batches in turn, so that rows do not follow each other; use 0 or 1, and more "
        "data.num_shards",
    ),
    Rule(
        lambda c: _are_unique_names(c.sources),
        "two tables of [[data.sources]] have the same name; names are keys of the metrics",
    ),
    Rule(
        lambda c: _are_unique_names(c.heldout_sets),
        "two tables of [[data.heldout_sets]] have the same name; names are keys of the metrics",
    ),
)


def _source_rules(table: str) -> tuple[Rule, ...]:
    """Conditions between the settings of a source, for messages about `table`."""
    table = table.replace("{", "{{").replace("}", "}}")
    needed = {
        "files": ("files", "name at least one path, folder or glob"),
        "tfds": ("tfds_name", "name a prepared data set"),
        "hf": ("hf_path", "name a folder written by save_to_disk, or a loader with hf_streaming"),
    }

    def has_setting(kind: str, name: str) -> Callable[[Any], bool]:
        return lambda c: c.kind != kind or bool(getattr(c, name))

    return (
        *(
            Rule(
                has_setting(kind, name),
                f"{table}.source is {kind!r} but {table}.{name} is empty; {hint}",
            )
            for kind, (name, hint) in needed.items()
        ),
        Rule(
            lambda c: c.kind != "python_stdlib" or not c.files,
            f"{table}.source is 'python_stdlib' but {table}.files is set; leave {table}.source out",
        ),
        Rule(
            lambda c: not c.hf_streaming or (c.kind == "hf" and bool(c.files)),
            f"{table}.hf_streaming needs {table}.hf_path (a loader such as 'json') and "
            f"{table}.files",
        ),
    )


def _is_name(text: str) -> bool:
    return bool(text) and all(c.isalnum() or c in "_-." for c in text)


def _are_unique_names(tables: Sequence[Any]) -> bool:
    names = [entry.name for entry in tables]
    return len(set(names)) == len(names)
