"""The result of a held-out evaluation, computed from the sums of its batches."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from megalodon_jax.errors import DataError
from megalodon_jax.loss import LossOutput
from megalodon_jax.typing import Batch, CountedBatch


class Evaluation(NamedTuple):
    """How well a model predicts a text.

    Attributes:
      loss: mean cross-entropy in nats per predicted token, eos tokens included.
      bits_per_byte: total nats / ln 2 / bytes of text; comparable between tokenizers. NaN if the
        bytes are not known.
      perplexity: exp(loss), per token.
      num_tokens: number of predicted tokens; of examples in classification.
      num_bytes: UTF-8 bytes that they encode; 0 if not known.
      accuracy: fraction of examples, or of masked tokens, with the right answer; None for the next
        token.
      confusion: counts of examples by their class (rows) and the answer (columns); None without
        classes.
    """

    loss: float
    bits_per_byte: float
    perplexity: float
    num_tokens: int
    num_bytes: int
    accuracy: float | None = None
    confusion: np.ndarray | None = None

    @property
    def selection_loss(self) -> float:
        """The number by which the best checkpoint is chosen: lower is better."""
        return self.loss if self.accuracy is None else 1.0 - self.accuracy

    def metrics(self) -> dict[str, float]:
        """The numbers that a run logs."""
        if self.accuracy is not None:
            return {"loss": self.loss, "accuracy": self.accuracy}
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte}

    def describe(self) -> str:
        """The numbers as text, without bits per byte if the bytes are not known."""
        if self.accuracy is not None:
            return (
                f"accuracy {self.accuracy:.2%} ({self.num_tokens:,} answers, loss {self.loss:.4f})"
            )
        loss = f"loss {self.loss:.4f} nats per token"
        if math.isnan(self.bits_per_byte):
            return f"{loss} ({self.num_tokens:,} tokens)"
        return f"bits per byte {self.bits_per_byte:.4f} ({self.num_bytes:,} bytes, {loss})"


EvalStep = Callable[[nnx.State, Batch], LossOutput]
Metric = Callable[[Sequence[LossOutput], int | None], Evaluation]


def summarize(sums: Sequence[LossOutput], num_bytes: int | None) -> Evaluation:
    """Computes the result from the sums of all batches.

    Args:
      sums: the sums of every batch.
      num_bytes: UTF-8 bytes of their text; None: not known.

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
    bits_per_byte = math.nan if num_bytes is None else nats / math.log(2) / num_bytes
    return Evaluation(loss, bits_per_byte, perplexity, num_tokens, num_bytes or 0)


def evaluate_batches(
    eval_step: EvalStep,
    params: nnx.State,
    batches: Iterable[CountedBatch],
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


def _sum_if_known(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


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
    sets: Mapping[str, Iterable[CountedBatch]],
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
    all_bytes: int | None = 0
    by_set = {}
    for name, batches in sets.items():
        sums: list[LossOutput] = []
        num_bytes: int | None = 0
        for batch, batch_bytes in batches:
            # One batch runs and one waits: a caller that ends `batches` early waits for two.
            if len(sums) >= 2:
                jax.block_until_ready(sums[-2])
            sums.append(eval_step(params, batch))
            num_bytes = _sum_if_known(num_bytes, batch_bytes)
            if max_batches is not None and len(sums) >= max_batches:
                break
        if name:
            by_set[name] = metric(sums, num_bytes)
        all_sums += sums
        all_bytes = _sum_if_known(all_bytes, num_bytes)
    return HeldoutEvaluation(metric(all_sums, all_bytes), by_set)
