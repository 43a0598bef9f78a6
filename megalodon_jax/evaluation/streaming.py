"""Evaluation of documents of any length in constant device memory."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from megalodon_jax.config import DataConfig, KvFormat, WeightFormat
from megalodon_jax.data.open_source import open_source
from megalodon_jax.data.sources import Source
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.evaluation.decoded import decode_batch
from megalodon_jax.evaluation.summary import Evaluation, summarize
from megalodon_jax.inference.decoders import AnyDecodeWeights, prepare_decoding
from megalodon_jax.inference.prefill import empty_prefill_state, score_hidden
from megalodon_jax.language_model import LanguageModel, StreamingCache
from megalodon_jax.loss import LossOutput, cross_entropy
from megalodon_jax.typing import Array, Batch, Bool, Float32, Int32


def evaluate_files(
    model: LanguageModel,
    tokenizer: Tokenizer,
    files: Sequence[str],
    *,
    text_field: str = "text",
    document_separator: str = "",
    batch_size: int = 8,
    piece_length: int = 1024,
    weights: WeightFormat = "model",
    kv: KvFormat = "model",
) -> Evaluation:
    """Evaluates a model on text files; every token sees all previous text of its document.

    Device memory is independent of the documents' length, see `evaluate_documents`.

    Args:
      model: the model.
      tokenizer: the tokenizer that the model was trained with.
      files: paths or globs: plain text, .gz, .jsonl, .parquet.
      text_field: field of the text in .jsonl and .parquet files.
      document_separator: separator of documents in a plain file; empty: a file is one document.
      batch_size: maximum number of documents in parallel.
      piece_length: tokens per document and model call.
      weights: format of the weights, see `inference.weights.prepare`.
      kv: format of keys and values, see `Megalodon.init_cache`. If one of the two is not "model",
        every token goes through a decoding step, as generated tokens do.

    Raises:
      DataError: a file cannot be read, or there is no text.
      ValueError: the model does not have this format of weights, or of keys and values.
    """
    source = open_text_files(files, text_field, document_separator)
    return evaluate_documents(
        model,
        tokenizer,
        (document.text for document in source),
        # More rows than documents would be padding.
        batch_size=min(batch_size, len(source)),
        piece_length=piece_length,
        weights=weights,
        kv=kv,
    )


def open_text_files(
    files: Sequence[str], text_field: str = "text", document_separator: str = ""
) -> Source:
    """The documents of text files, in the files' order; arguments as for `evaluate_files`.

    Raises:
      DataError: a file cannot be read, or there is no text.
    """
    config = DataConfig(
        source="files",
        files=tuple(files),
        heldout_fraction=0.0,
        text_field=text_field,
        document_separator=document_separator,
    )
    return open_source(config, "train")


def evaluate_documents(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    batch_size: int = 8,
    piece_length: int = 1024,
    weights: WeightFormat = "model",
    kv: KvFormat = "model",
) -> Evaluation:
    """Evaluates a model on texts by streaming each document through the cache in pieces.

    Every row of the batch processes one document after another; the cache carries the complete
    context of a document. The cache of a Transformer with full attention grows with the document.
    Arguments as for `evaluate_files`.

    Raises:
      OverflowError: a document exceeds the largest 32-bit position.
    """
    counter = _ByteCounter(texts)
    streams = (_stream(tokenizer, text) for text in counter)
    graphdef, params = nnx.split(model)
    cache = empty_prefill_state(graphdef, params, batch_size, piece_length, kv).cache
    step = partial(_streaming_step, graphdef, params)
    if (weights, kv) != ("model", "model"):
        step = partial(decode_batch, graphdef, params, _prepared(graphdef, params, weights))
    sums: list[LossOutput] = []
    for batch in streaming_batches(streams, batch_size=batch_size, length=piece_length):
        cache = model.with_room(cache, piece_length)
        piece_sums, cache = step(cache, batch)
        sums.append(jax.device_get(piece_sums))
    return summarize(sums, counter.num_bytes)


class TokenScores(NamedTuple):
    """How a model scores the tokens of one sequence, from the second token on.

    Attributes:
      index: the sequence's index in the input.
      logprobs: natural logarithm of each token's probability after all tokens before it.
      is_greedy: whether the token is the most probable one; ties prefer lower ids.
    """

    index: int
    logprobs: Float32[np.ndarray, " n-1"]
    is_greedy: Bool[np.ndarray, " n-1"]


def score_sequences(
    model: LanguageModel,
    sequences: Iterable[Int32[np.ndarray, " n"]],
    *,
    batch_size: int = 8,
    piece_length: int = 1024,
) -> Iterator[TokenScores]:
    """Scores every token of token sequences of any length, in the order in which they end.

    Sequences are streamed like documents, see `evaluate_documents`: every token sees all previous
    tokens of its sequence, and no other sequence.

    Args:
      model: the model.
      sequences: token ids, at least two each.
      batch_size: maximum number of sequences in parallel.
      piece_length: tokens per row and model call.

    Raises:
      ValueError: a sequence has fewer than two tokens.
      OverflowError: a sequence exceeds the largest 32-bit position.
    """
    lengths: dict[int, int] = {}
    open_scores: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    graphdef, params = nnx.split(model)
    cache = empty_prefill_state(graphdef, params, batch_size, piece_length).cache
    streams = _checked_sequences(sequences, lengths)
    for batch in streaming_batches(streams, batch_size=batch_size, length=piece_length):
        cache = model.with_room(cache, piece_length)
        scores, cache = _scoring_step(graphdef, params, cache, batch)
        logprobs, is_greedy = jax.device_get(scores)
        for number, where in _documents_of(np.asarray(batch.segment_ids)):
            parts = open_scores.setdefault(number, [])
            parts.append((logprobs[where], is_greedy[where]))
            if sum(len(part) for part, _ in parts) == lengths[number] - 1:
                joined = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                yield TokenScores(number - 1, *joined)
                del open_scores[number], lengths[number]


def _checked_sequences(
    sequences: Iterable[np.ndarray], lengths: dict[int, int]
) -> Iterator[np.ndarray]:
    """The sequences, whose lengths are put into `lengths` by their numbers from 1."""
    for number, tokens in enumerate(sequences, start=1):
        if len(tokens) < 2:
            raise ValueError(
                f"sequence {number - 1} has {len(tokens)} tokens; a score needs a token and one "
                "before it (a text begins with the tokenizer's bos_id)"
            )
        lengths[number] = len(tokens)
        yield tokens


def _documents_of(
    segment_ids: np.ndarray,
) -> Iterator[tuple[int, tuple[int, slice]]]:
    """Every segment id in a batch but 0, and its row and columns."""
    for row, ids in enumerate(segment_ids):
        starts = np.flatnonzero(np.diff(ids, prepend=0))
        for start, stop in itertools.pairwise([*starts, len(ids)]):
            if ids[start] != 0:
                yield int(ids[start]), (row, slice(start, stop))


def streaming_batches(
    streams: Iterator[np.ndarray], *, batch_size: int, length: int, packed: bool = True
) -> Iterator[Batch]:
    """Cuts documents into consecutive batches (batch_size, length).

    Row b of a batch continues row b of the previous batch. A document's segment id is its number in
    `streams`, from 1, in all batches: the model's cache is continued within a document and reset
    between documents.

    Args:
      streams: documents as bos, tokens, eos.
      batch_size: number of rows.
      length: tokens per row.
      packed: whether a document begins in the batch in which the row's last one ends; False: in the
        next batch.
    """
    rows = [_StreamRow() for _ in range(batch_size)]
    numbered = enumerate(streams, start=1)
    while True:
        shape = (batch_size, length)
        ids = (np.zeros(shape, np.int32) for _ in range(3))
        batch = Batch(*ids, weights=np.zeros(shape, np.float32))  # type: ignore[arg-type]
        filled = [
            row.fill(Batch(*(array[index] for array in batch)), numbered, packed)
            for index, row in enumerate(rows)
        ]
        if not any(filled):
            return
        yield batch


class _StreamRow:
    """One row of the batches: its current document and the next token in it."""

    def __init__(self) -> None:
        self._stream = np.zeros(1, np.int32)
        self._offset = 0
        self._segment = 0

    def fill(self, row: Batch, streams: Iterator[tuple[int, np.ndarray]], packed: bool) -> int:
        """Fills the row's arrays from the left; returns the number of tokens."""
        column, length = 0, row.tokens.shape[0]
        while column < length:
            is_at_end = self._offset == len(self._stream) - 1
            if is_at_end and ((column and not packed) or not self._next(streams)):
                break
            count = min(length - column, len(self._stream) - 1 - self._offset)
            columns = slice(column, column + count)
            row.tokens[columns] = self._stream[self._offset : self._offset + count]
            row.targets[columns] = self._stream[self._offset + 1 : self._offset + 1 + count]
            row.segment_ids[columns] = self._segment
            row.weights[columns] = 1.0
            column += count
            self._offset += count
        return column

    def _next(self, streams: Iterator[tuple[int, np.ndarray]]) -> bool:
        numbered = next(streams, None)
        if numbered is None:
            return False
        self._segment, self._stream = numbered
        self._offset = 0
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
    stream = np.concatenate([[tokenizer.bos_id], tokenizer.encode(text), [tokenizer.eos_id]])
    return stream.astype(np.int32)


@partial(jax.jit, static_argnums=(0, 2))
def _prepared(graphdef: nnx.GraphDef, params: nnx.State, weights: WeightFormat) -> AnyDecodeWeights:
    return prepare_decoding(nnx.merge(graphdef, params), weights)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _streaming_step(
    graphdef: nnx.GraphDef, params: nnx.State, cache: StreamingCache, batch: Batch
) -> tuple[LossOutput, StreamingCache]:
    model: LanguageModel = nnx.merge(graphdef, params)
    hidden, new_cache = model.hidden(batch.tokens, segment_ids=batch.segment_ids, cache=cache)
    assert new_cache is not None
    sums = cross_entropy(hidden, model.output_matrix(), batch.targets, batch.weights)
    return sums, new_cache


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _scoring_step(
    graphdef: nnx.GraphDef, params: nnx.State, cache: StreamingCache, batch: Batch
) -> tuple[tuple[Float32[Array, "B L"], Bool[Array, "B L"]], StreamingCache]:
    model: LanguageModel = nnx.merge(graphdef, params)
    hidden, new_cache = model.hidden(batch.tokens, segment_ids=batch.segment_ids, cache=cache)
    assert new_cache is not None
    scores = score_hidden(model, hidden, batch.targets, 1)
    return (scores.token, scores.top_ids[..., 0] == batch.targets), new_cache
