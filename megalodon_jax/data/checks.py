"""Checks of a split before its loader starts."""

from collections.abc import Sequence

from megalodon_jax.config import DataConfig
from megalodon_jax.data.huggingface import StreamedSource
from megalodon_jax.data.pieces import read_piece
from megalodon_jax.data.reader import BadDocuments, with_way_out
from megalodon_jax.data.sources import Source
from megalodon_jax.data.splits import Split, cuts_documents
from megalodon_jax.data.text_files import naming
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.errors import DataError


def check_shards(source: Source | StreamedSource, config: DataConfig, num_shards: int) -> None:
    """Raises `DataError` if rows or documents do not divide among shards and workers."""
    if config.batch_size % num_shards:
        raise DataError(
            f"data.batch_size {config.batch_size} does not divide by {num_shards} data shards; set "
            "data.num_shards to one of its divisors"
        )
    num_readers = num_shards * max(1, config.num_workers)
    if isinstance(source, Source) and len(source) < num_readers:
        raise DataError(
            f"{len(source)} documents are too few for {num_shards} data shards with "
            f"{config.num_workers} workers each; lower data.num_shards or data.num_workers, or set "
            "data.document_separator"
        )
    if config.carry_state and isinstance(source, Source) and len(source) < config.batch_size:
        raise DataError(
            f"{len(source)} documents are fewer than the {config.batch_size} rows of "
            "data.batch_size, and data.carry_state gives every row documents of its own; lower "
            "data.batch_size, or set data.document_separator or carry_state = false"
        )
    if config.num_workers < 0:
        raise DataError(f"data.num_workers is {config.num_workers}; must not be negative")
    if not 0 <= config.shuffle_seed < 2**32:
        raise DataError(f"data.shuffle_seed is {config.shuffle_seed}; must be in [0, 2^32)")


def require_whole_records(sources: Sequence[Source | StreamedSource]) -> None:
    """Raises `DataError` if the held-out part of records would be parts of every record."""
    if any(isinstance(source, Source) and cuts_documents(source) for source in sources):
        raise DataError(
            "data.heldout_fraction leaves training or held-out data without a whole record; name "
            "data.heldout_files, or set data.heldout_fraction to 0"
        )


def require_tokens(
    source: Source | StreamedSource,
    tokenizer: Tokenizer,
    split: Split,
    *,
    on_bad_document: BadDocuments,
) -> None:
    """Raises `DataError` if no document has a token; reads up to the first one that has."""
    if isinstance(source, StreamedSource):
        return
    for index in range(len(source)):
        try:
            if _has_token(source, index, tokenizer):
                return
        except DataError as error:
            if on_bad_document == "stop":
                raise with_way_out(error) from error
    raise DataError(
        f"the {len(source)} documents of split {split!r} have no token; check the files and "
        "data.text_field"
    )


def _has_token(source: Source, index: int, tokenizer: Tokenizer) -> bool:
    with naming(lambda: source.where(index)):
        content = source.open(index)
        start = 0
        while True:
            piece = read_piece(content, start, tokenizer)
            if len(tokenizer.encode(piece.text)):
                return True
            if piece.is_last:
                return False
            start = piece.stop
