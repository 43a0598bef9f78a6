"""Evaluation on documents of any length, in constant device memory."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx

from megalodon_jax.cache import Cache
from megalodon_jax.config import DataConfig
from megalodon_jax.data.sources import open_source
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.evaluation.summary import Evaluation, summarize
from megalodon_jax.generate import fresh_cache
from megalodon_jax.loss import LossOutput, cross_entropy
from megalodon_jax.model import Megalodon
from megalodon_jax.typing import Batch


def evaluate_files(
    model: Megalodon,
    tokenizer: Tokenizer,
    files: Sequence[str],
    *,
    text_field: str = "text",
    document_separator: str = "",
    batch_size: int = 8,
    piece_length: int = 1024,
) -> Evaluation:
    """Measures on whole files, every document with all of its own text before as context.

    Device memory does not depend on the documents' length: see `evaluate_documents`.

    Args:
      model: the model.
      tokenizer: the one it was trained with.
      files: paths or globs: plain text, .gz, .jsonl, .parquet.
      text_field: field of the text in .jsonl and .parquet.
      document_separator: splits a plain file into documents; empty: a file is a document.
      batch_size: documents that are read side by side, at most.
      piece_length: tokens of a document that go through the model at a time.

    Raises:
      DataError: a file cannot be read, or there is no text.
    """
    source = open_source(
        DataConfig(
            source="files",
            files=tuple(files),
            heldout_fraction=0.0,
            text_field=text_field,
            document_separator=document_separator,
        ),
        "train",
    )
    return evaluate_documents(
        model,
        tokenizer,
        (document.text for document in source),
        # A row without a document would be computed for nothing.
        batch_size=min(batch_size, len(source)),
        piece_length=piece_length,
    )


def evaluate_documents(
    model: Megalodon,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    batch_size: int = 8,
    piece_length: int = 1024,
) -> Evaluation:
    """Measures on texts by streaming each one through the cache, piece by piece.

    Each row of the batch reads one document after another; a document's whole past counts, through
    the cache, whatever its length. Arguments as for `evaluate_files`.

    Raises:
      OverflowError: a document is longer than the cache's 32-bit counter.
    """
    counter = _ByteCounter(texts)
    streams = (_stream(tokenizer, text) for text in counter)
    graphdef, params = nnx.split(model)
    cache = fresh_cache(graphdef, params, batch_size)
    sums: list[LossOutput] = []
    for batch in streaming_batches(streams, batch_size=batch_size, length=piece_length):
        cache.check_room(piece_length)
        piece_sums, cache = _streaming_step(graphdef, params, cache, batch)
        sums.append(jax.device_get(piece_sums))
    return summarize(sums, counter.num_bytes)


def streaming_batches(
    streams: Iterator[np.ndarray], *, batch_size: int, length: int
) -> Iterator[Batch]:
    """Cuts documents into batches of (batch_size, length) that continue from one to the next.

    Row b of a batch goes on where row b of the batch before stopped. A document keeps its segment
    id across batches, and the next document of the same row has another one, so that a model's
    cache continues exactly the documents that go on.

    Args:
      streams: documents as mark, tokens, mark.
      batch_size: rows.
      length: tokens in a row.
    """
    rows = [_StreamRow() for _ in range(batch_size)]
    while True:
        shape = (batch_size, length)
        ids = (np.zeros(shape, np.int32) for _ in range(3))
        batch = Batch(*ids, weights=np.zeros(shape, np.float32))  # type: ignore[arg-type]
        filled = [
            lane.fill(Batch(*(array[row] for array in batch)), streams)
            for row, lane in enumerate(rows)
        ]
        if not any(filled):
            return
        yield batch


class _StreamRow:
    """One row of the stream: the document it is in, and how far."""

    def __init__(self) -> None:
        self._stream = np.zeros(1, np.int32)
        self._at = 0
        self._segment = 0

    def fill(self, row: Batch, streams: Iterator[np.ndarray]) -> int:
        """Fills the row's arrays from the left; returns how many tokens it found."""
        column, length = 0, row.tokens.shape[0]
        while column < length:
            if self._at == len(self._stream) - 1 and not self._next(streams):
                break
            count = min(length - column, len(self._stream) - 1 - self._at)
            here = slice(column, column + count)
            row.tokens[here] = self._stream[self._at : self._at + count]
            row.targets[here] = self._stream[self._at + 1 : self._at + 1 + count]
            row.segment_ids[here] = self._segment
            row.weights[here] = 1.0
            column += count
            self._at += count
        return column

    def _next(self, streams: Iterator[np.ndarray]) -> bool:
        stream = next(streams, None)
        if stream is None:
            return False
        self._stream, self._at = stream, 0
        self._segment += 1
        return True


class _ByteCounter:
    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.num_bytes += len(text.encode("utf-8"))
            yield text


def _stream(tokenizer: Tokenizer, text: str) -> np.ndarray:
    marks = ([tokenizer.bos_id], [tokenizer.eos_id])
    return np.concatenate([marks[0], tokenizer.encode(text), marks[1]]).astype(np.int32)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _streaming_step(
    graphdef: nnx.GraphDef, params: nnx.State, cache: Cache, batch: Batch
) -> tuple[LossOutput, Cache]:
    model: Megalodon = nnx.merge(graphdef, params)
    hidden, new_cache = model.hidden(batch.tokens, segment_ids=batch.segment_ids, cache=cache)
    assert new_cache is not None
    sums = cross_entropy(hidden, model.output_matrix(), batch.targets, batch.weights)
    return sums, new_cache
