"""The result of a held-out evaluation, computed from the sums of its batches."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
from flax import nnx

from megalodon_jax.errors import DataError
from megalodon_jax.loss import LossOutput
from megalodon_jax.typing import Batch

if TYPE_CHECKING:
    # Training steps and benchmarks run without the data libraries.
    from megalodon_jax.data.packing import CountedBatch


class Evaluation(NamedTuple):
    """How well a model predicts a text.

    Attributes:
      loss: mean cross-entropy in nats per predicted token, eos tokens included.
      bits_per_byte: total nats / ln 2 / bytes of text; comparable between tokenizers.
      perplexity: exp(loss), per token.
      num_tokens: number of predicted tokens.
      num_bytes: UTF-8 bytes that they encode.
    """

    loss: float
    bits_per_byte: float
    perplexity: float
    num_tokens: int
    num_bytes: int


EvalStep = Callable[[nnx.State, Batch], LossOutput]
Metric = Callable[[Sequence[LossOutput], int], Evaluation]


def summarize(sums: Sequence[LossOutput], num_bytes: int) -> Evaluation:
    """Computes the result from the sums of all batches.

    Args:
      sums: the sums of every batch.
      num_bytes: UTF-8 bytes of their text.

    Raises:
      DataError: the batches have no token.
    """
    # Summed in float64: a float32 sum over a million batches loses the increments.
    nats = math.fsum(float(batch.loss_sum) for batch in sums)
    num_tokens = round(math.fsum(float(batch.weight_sum) for batch in sums))
    if num_tokens == 0 or num_bytes == 0:
        raise DataError(
            f"nothing to evaluate: {num_tokens} tokens for {num_bytes} bytes of text; give files "
            "with text"
        )
    loss = nats / num_tokens
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    return Evaluation(loss, nats / math.log(2) / num_bytes, perplexity, num_tokens, num_bytes)


def evaluate_batches(
    eval_step: EvalStep,
    params: nnx.State,
    batches: "Iterable[CountedBatch]",
    *,
    metric: Metric = summarize,
    max_batches: int | None = None,
) -> Evaluation:
    """Evaluates a model on the first batches of a single pass over held-out data.

    Args:
      eval_step: from `make_eval_step`.
      params: the model's parameters.
      batches: from `Loader.with_bytes`.
      metric: computes the result from the sums of all batches and the bytes of their text.
      max_batches: maximum number of batches; None: all.
    """
    return evaluate_sets(
        eval_step, params, {"": batches}, metric=metric, max_batches=max_batches
    ).all_sets


class HeldoutEvaluation(NamedTuple):
    """The evaluation of several held-out sets.

    Attributes:
      all_sets: over the batches of all sets.
      by_set: of every set by its name; empty if there is only one without a name.
    """

    all_sets: Evaluation
    by_set: dict[str, Evaluation]


def evaluate_sets(
    eval_step: EvalStep,
    params: nnx.State,
    sets: "Mapping[str, Iterable[CountedBatch]]",
    *,
    metric: Metric = summarize,
    max_batches: int | None = None,
) -> HeldoutEvaluation:
    """Evaluates a model on the first batches of several held-out sets.

    Args:
      eval_step: from `make_eval_step`.
      params: the model's parameters.
      sets: by name, batches from `Loader.with_bytes`.
      metric: computes the result from the sums of batches and the bytes of their text.
      max_batches: maximum number of batches of a set; None: all.
    """
    all_sums: list[LossOutput] = []
    all_bytes = 0
    by_set = {}
    for name, batches in sets.items():
        sums: list[LossOutput] = []
        num_bytes = 0
        for batch, batch_bytes in batches:
            # One batch runs and one waits: a caller that ends `batches` early waits for two.
            if len(sums) >= 2:
                jax.block_until_ready(sums[-2])
            sums.append(eval_step(params, batch))
            num_bytes += batch_bytes
            if max_batches is not None and len(sums) >= max_batches:
                break
        if name:
            by_set[name] = metric(sums, num_bytes)
        all_sums += sums
        all_bytes += num_bytes
    return HeldoutEvaluation(metric(all_sums, all_bytes), by_set)
