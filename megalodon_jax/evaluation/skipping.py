"""Loss and decoding time without the attention sub-layers of the last blocks."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.evaluation.context import perplexity_by_context
from megalodon_jax.evaluation.costs import decode_seconds
from megalodon_jax.evaluation.token_scores import TOKENS_PER_CALL
from megalodon_jax.evaluation.variants import without_last_attention
from megalodon_jax.language_model import LanguageModel


class SkippedAttention(NamedTuple):
    """A model without the attention sub-layers of its last blocks.

    Attributes:
      skipped: number of attention sub-layers that are left out.
      loss: mean cross-entropy of whole documents in nats per token.
      perplexity: exp(loss).
      bits_per_byte: total nats / ln 2 / bytes of text.
      num_tokens: tokens that were predicted.
      decode_milliseconds: median of a decoding step of `rows` rows.
      rows: rows that were decoded side by side.
    """

    skipped: int
    loss: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int
    decode_milliseconds: float
    rows: int


def skip_attention(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    skips: Sequence[int],
    max_tokens: int | None = None,
    rows: int = 1,
    repeats: int = 3,
    tokens_per_call: int = TOKENS_PER_CALL,
) -> tuple[SkippedAttention, ...]:
    """Loss and decoding time without the last attention sub-layers (Tyukin et al. 2024).

    Args:
      model: the model.
      tokenizer: the tokenizer that the model was trained with.
      texts: documents.
      skips: numbers of sub-layers to leave out; 0: the whole model.
      max_tokens: read only the first tokens of the text; None: all.
      rows: rows that are decoded side by side.
      repeats: timed calls of 64 decoding steps.
      tokens_per_call: tokens that go through the model at a time.

    Returns:
      A result for every number, in the order of `skips`.

    Raises:
      DataError: there is no text.
      ValueError: an argument is out of range, or the model has fewer layers.
    """
    # All are made first: a number that is too large is an error before anything is computed.
    models = [without_last_attention(model, count) for count in skips]
    documents = list(texts)
    results = []
    for count, each in zip(skips, models, strict=True):
        (loss,) = perplexity_by_context(
            each,
            tokenizer,
            documents,
            contexts=(0,),
            max_tokens=max_tokens,
            tokens_per_call=tokens_per_call,
        )
        results.append(
            SkippedAttention(
                skipped=count,
                loss=loss.loss,
                perplexity=loss.perplexity,
                bits_per_byte=loss.bits_per_byte,
                num_tokens=loss.num_tokens,
                decode_milliseconds=1e3 * decode_seconds(each, rows=rows, repeats=repeats),
                rows=rows,
            )
        )
    return tuple(results)
