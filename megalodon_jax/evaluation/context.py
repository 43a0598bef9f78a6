"""Loss against context: perplexity by the length of blocks, and loss by the position of a token."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32

from megalodon_jax.cache import MAX_POSITION
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.errors import DataError
from megalodon_jax.evaluation.token_scores import TOKENS_PER_CALL, score_batches
from megalodon_jax.language_model import LanguageModel

# Positions below 2^31.
_NUM_BUCKETS = 31


class ContextLoss(NamedTuple):
    """How well a model predicts a text that is cut into blocks of one length.

    Attributes:
      context: most tokens of a block; 0: a block is a whole document.
      loss: mean cross-entropy in nats over all tokens.
      perplexity: exp(loss), per token.
      bits_per_byte: total nats / ln 2 / bytes of text.
      num_tokens: tokens that were predicted, each once.
      num_blocks: blocks, each from the empty state.
      tail_loss: mean cross-entropy over the last tokens of blocks; NaN if there are none.
      tail_perplexity: exp(tail_loss).
      tail_tokens: their number.
      seconds: wall time, compilation included.
    """

    context: int
    loss: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int
    num_blocks: int
    tail_loss: float
    tail_perplexity: float
    tail_tokens: int
    seconds: float


class PositionLoss(NamedTuple):
    """The loss of tokens by the number of tokens that they see.

    Attributes:
      first: fewest tokens that a prediction sees, bos included.
      last: most of them.
      loss: mean cross-entropy in nats.
      perplexity: exp(loss).
      num_tokens: tokens that were predicted.
    """

    first: int
    last: int
    loss: float
    perplexity: float
    num_tokens: int


class _TokenizedText(NamedTuple):
    """Targets of one document or of several joined ones: tokens and eos; and their bytes."""

    targets: Int32[np.ndarray, " n"]
    num_bytes: int


class _Block(NamedTuple):
    """Targets of a block, and the first of them that is in its tail."""

    targets: Int32[np.ndarray, " n"]
    tail_start: int


def perplexity_by_context(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    contexts: Sequence[int],
    tail: int = 1024,
    join: bool = False,
    max_tokens: int | None = None,
    tokens_per_call: int = TOKENS_PER_CALL,
) -> tuple[ContextLoss, ...]:
    """Perplexity of the same text at several lengths of context (Ma et al. 2024, section 4.3).

    For a context c every document is cut into blocks of c tokens. A block begins with bos and the
    empty state, so its i-th token is predicted from the i - 1 tokens before it, and every token of
    the text is scored once. `tail_loss` is over the last tokens of full blocks, each of which sees
    at least c - `tail` tokens. Device memory is that of `tokens_per_call` tokens and the cache.

    Args:
      model: the model. For a Transformer with another window see `with_window`.
      tokenizer: the tokenizer that the model was trained with.
      texts: the documents; each ends with eos, which is scored too.
      contexts: lengths c of blocks in tokens; 0: whole documents.
      tail: tokens at the end of a block that `tail_loss` counts.
      join: read the documents as one, one behind the other.
      max_tokens: read only the first tokens of the text; None: all.
      tokens_per_call: tokens that go through the model at a time.

    Returns:
      A result for every context, in the order of `contexts`.

    Raises:
      DataError: there is no text.
      ValueError: an argument is out of range.
      OverflowError: a block exceeds the largest 32-bit position.
    """
    check_context_options(contexts, tail, max_tokens, tokens_per_call)
    documents = _tokenized(tokenizer, texts, join, max_tokens)
    num_bytes = sum(document.num_bytes for document in documents)
    results = []
    for context in contexts:
        started = time.perf_counter()
        blocks = [block for each in documents for block in _cut(each.targets, context, tail)]
        sums = _block_sums(model, tokenizer.bos_id, blocks, tokens_per_call)
        nats, count = float(sums.nats.sum()), int(sums.counts.sum())
        loss = nats / count
        tail_loss = sums.tail_nats / sums.tail_count if sums.tail_count else math.nan
        results.append(
            ContextLoss(
                context=context,
                loss=loss,
                perplexity=_exp(loss),
                bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else math.nan,
                num_tokens=count,
                num_blocks=len(blocks),
                tail_loss=tail_loss,
                tail_perplexity=_exp(tail_loss),
                tail_tokens=sums.tail_count,
                seconds=time.perf_counter() - started,
            )
        )
    return tuple(results)


def loss_by_position(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    join: bool = False,
    max_tokens: int | None = None,
    tokens_per_call: int = TOKENS_PER_CALL,
) -> tuple[PositionLoss, ...]:
    """The loss of whole documents by position, in buckets whose bounds are powers of two.

    Arguments and errors as for `perplexity_by_context`.

    Returns:
      A result for every bucket with tokens: 1 token seen (bos), 2 to 3, 4 to 7, ...
    """
    check_context_options((0,), 0, max_tokens, tokens_per_call)
    documents = _tokenized(tokenizer, texts, join, max_tokens)
    blocks = [_Block(each.targets, len(each.targets)) for each in documents]
    sums = _block_sums(model, tokenizer.bos_id, blocks, tokens_per_call)
    results = []
    for bucket, (nats, count) in enumerate(zip(sums.nats, sums.counts, strict=True)):
        if count:
            loss = float(nats) / int(count)
            bounds = (1 << bucket, (2 << bucket) - 1)
            results.append(PositionLoss(*bounds, loss, _exp(loss), int(count)))
    return tuple(results)


def check_context_options(
    contexts: Sequence[int], tail: int, max_tokens: int | None, tokens_per_call: int
) -> None:
    """Raises ValueError if an argument of `perplexity_by_context` is out of range."""
    if not contexts or min(contexts) < 0:
        raise ValueError(f"contexts are {tuple(contexts)}; give lengths in tokens, 0 for all")
    if tail < 0:
        raise ValueError(f"tail is {tail}; use 0 or more tokens")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; use 1 or more, or None for all")
    if tokens_per_call < 1:
        raise ValueError(f"tokens_per_call is {tokens_per_call}; use 1 or more")


def _tokenized(
    tokenizer: Tokenizer, texts: Iterable[str], join: bool, max_tokens: int | None
) -> list[_TokenizedText]:
    """The documents' targets, up to `max_tokens` of them; a single one if they are joined."""
    documents = []
    room = max_tokens
    for text in texts:
        if room == 0:
            break
        ids, num_bytes, tail_bytes = tokenizer.encode_counted(text)
        targets = np.append(ids, np.int32(tokenizer.eos_id)).astype(np.int32)
        byte_counts = np.append(num_bytes, tail_bytes)
        if room is not None:
            targets, byte_counts = targets[:room], byte_counts[:room]
            room -= len(targets)
        documents.append(_TokenizedText(targets, int(byte_counts.sum(dtype=np.int64))))
    if not sum(each.num_bytes for each in documents):
        raise DataError(f"nothing to evaluate: no text in {len(documents)} documents")
    if not join:
        return documents
    targets = np.concatenate([each.targets for each in documents])
    return [_TokenizedText(targets, sum(each.num_bytes for each in documents))]


def _cut(targets: Int32[np.ndarray, " n"], context: int, tail: int) -> Iterator[_Block]:
    """Blocks of `context` targets; a shorter last one has the tail of a full one, if any."""
    size = context or len(targets)
    for start in range(0, len(targets), size):
        yield _Block(targets[start : start + size], max(0, size - tail))


class _Sums(NamedTuple):
    """Sums over tokens by bucket of position, and over the tails of blocks, in float64."""

    nats: Float64[np.ndarray, " K"]
    counts: Float64[np.ndarray, " K"]
    tail_nats: float
    tail_count: int


def _block_sums(
    model: LanguageModel, bos_id: int, blocks: Sequence[_Block], tokens_per_call: int
) -> _Sums:
    """Sums over all targets of all blocks."""
    streams = [np.concatenate([[bos_id], block.targets]).astype(np.int32) for block in blocks]
    # The documents' ids count from 1.
    tail_starts = np.array([MAX_POSITION, *(block.tail_start for block in blocks)])
    nats, counts = np.zeros((2, _NUM_BUCKETS))
    tail_nats, tail_count = 0.0, 0
    for batch in score_batches(model, streams, tokens_per_call=tokens_per_call):
        is_token = batch.segment_ids != 0
        losses = np.asarray(batch.nats, np.float64)[is_token]
        position = np.asarray(batch.position)[is_token]
        # floor(log2(tokens that the prediction sees))
        bucket = np.frexp(position + 1)[1] - 1
        nats += np.bincount(bucket, losses, _NUM_BUCKETS)
        counts += np.bincount(bucket, minlength=_NUM_BUCKETS)
        in_tail = position >= tail_starts[np.asarray(batch.segment_ids)[is_token]]
        tail_nats += float(losses[in_tail].sum())
        tail_count += int(in_tail.sum())
    return _Sums(nats, counts, tail_nats, tail_count)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
