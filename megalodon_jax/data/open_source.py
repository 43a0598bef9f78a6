"""The sources that a configuration names: those of training, and the held-out sets."""

from collections.abc import Sequence

from megalodon_jax.config import DataConfig, TextSource
from megalodon_jax.data.find_files import find_files, open_files
from megalodon_jax.data.huggingface import StreamedSource, open_saved
from megalodon_jax.data.sources import FileSource, Source, StdlibSource, TfdsSource
from megalodon_jax.data.splits import Split, select_split
from megalodon_jax.errors import DataError
from megalodon_jax.storage.location import AnyPath


def heldout_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the held-out sets; one without `heldout_sets` and `sources` has the name ""."""
    if config.heldout_sets:
        return tuple(entry.name for entry in config.heldout_sets)
    if config.heldout_files:
        return ("",)
    if config.sources:
        return tuple(entry.name for entry in config.sources) if config.heldout_fraction else ()
    has_split = config.kind == "tfds" and bool(config.tfds_heldout_split)
    return ("",) if has_split or config.heldout_fraction else ()


def training_sources(config: DataConfig) -> tuple[TextSource, ...]:
    """The sources of training: those of the mixture, or the only one."""
    return config.sources or (config,)


def open_source(config: DataConfig, split: Split, *, name: str = "") -> Source:
    """Opens one split of the configured data.

    Args:
      config: the data.
      split: `"train"` or `"heldout"`.
      name: of the source of a mixture, or one of `heldout_names`; empty if there is only one.

    Raises:
      DataError: a file is missing or malformed, a data set is not prepared, there is no such name,
        the split has no document, or it is a stream, which has no access by index.
    """
    source = open_any_source(config, split, name=name)
    if isinstance(source, StreamedSource):
        raise DataError("data.hf_streaming gives a stream, which only a loader can read")
    return source


def open_any_source(config: DataConfig, split: Split, *, name: str = "") -> Source | StreamedSource:
    """Like `open_source`, for streams too."""
    if split not in ("train", "heldout"):
        raise DataError(f"split is {split!r}; use 'train' or 'heldout'")
    if split == "heldout" and (config.heldout_sets or config.heldout_files):
        entry = _find(_separate_sets(config), name)
        source = _open_whole(entry, find_files(entry.files))
    else:
        source = _open_split(config, _find(training_sources(config), name), split)
    _require_documents(source, config, split)
    return source


def _find[S: TextSource](sources: Sequence[S], name: str) -> S:
    names = [getattr(source, "name", "") for source in sources]
    if name not in names:
        raise DataError(
            f"there is no text source {name!r}; use one of {', '.join(map(repr, names))}"
        )
    return sources[names.index(name)]


def _separate_sets(config: DataConfig) -> tuple[TextSource, ...]:
    """The held-out sets that have files or data sets of their own."""
    if config.heldout_sets:
        return config.heldout_sets
    return (
        TextSource(
            source="files",
            files=config.heldout_files,
            text_field=config.text_field,
            document_separator=config.document_separator,
        ),
    )


def _open_split(config: DataConfig, entry: TextSource, split: Split) -> Source | StreamedSource:
    """A training source, without what is held out of it, or what is held out of it."""
    if config.heldout_sets or config.heldout_files:
        return _open_whole(entry, _without_heldout_files(config, entry))
    if entry is config and config.kind == "tfds" and config.tfds_heldout_split:
        name = config.tfds_split if split == "train" else config.tfds_heldout_split
        return TfdsSource(config, name)
    whole = _open_whole(entry, find_files(entry.files))
    if isinstance(whole, StreamedSource):
        return whole.select(config.heldout_fraction, split)
    _require_documents(whole, config, split)
    return select_split(whole, config.heldout_fraction, split)


def _without_heldout_files(config: DataConfig, entry: TextSource) -> list[AnyPath]:
    heldout = {
        path
        for separate in _separate_sets(config)
        if separate.files
        for path in find_files(separate.files)
    }
    # A glob of training files may match the held-out files too.
    training = [path for path in find_files(entry.files) if path not in heldout]
    if entry.files and not training:
        raise DataError(
            f"every file of data.files {entry.files} is in data.heldout_files too; name other "
            "training files"
        )
    return training


def _open_whole(entry: TextSource, files: Sequence[AnyPath]) -> Source | StreamedSource:
    match entry.kind:
        case "python_stdlib":
            return StdlibSource()
        case "tfds":
            return TfdsSource(entry, entry.tfds_split)
        case "hf" if entry.hf_streaming:
            return StreamedSource(entry, files)
        case "hf":
            return open_saved(entry)
        case "files":
            return FileSource(
                open_files(files, text_field=entry.text_field, separator=entry.document_separator)
            )


def _require_documents(source: Source | StreamedSource, config: DataConfig, split: Split) -> None:
    if isinstance(source, Source) and len(source) == 0:
        named = {
            "files": config.heldout_files if split == "heldout" else (),
            "tfds": config.tfds_name,
        }
        where = named.get(config.kind) or config.files or config.kind
        raise DataError(f"no document for split {split!r}: {where} is empty; name files with text")
