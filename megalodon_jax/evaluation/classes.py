"""The result of a classification, from the sums of its batches."""

import math
from collections.abc import Sequence

import numpy as np

from megalodon_jax.errors import DataError
from megalodon_jax.evaluation.summary import Evaluation
from megalodon_jax.loss import LossOutput


def summarize_classes(sums: Sequence[LossOutput]) -> Evaluation:
    """Loss, accuracy and confusion matrix over all batches.

    Raises:
      DataError: the batches have no example.
    """
    count = round(math.fsum(float(batch.weight_sum) for batch in sums))
    if count == 0:
        raise DataError("nothing to evaluate: the held-out sets have no example")
    loss = math.fsum(float(batch.loss_sum) for batch in sums) / count
    correct = math.fsum(float(batch.correct_sum) for batch in sums)
    matrices = [np.asarray(b.confusion, np.float64) for b in sums if b.confusion is not None]
    return Evaluation(
        loss=loss,
        bits_per_byte=math.nan,
        perplexity=math.exp(min(loss, 700.0)),
        num_tokens=count,
        num_bytes=0,
        accuracy=correct / count,
        confusion=np.sum(matrices, axis=0).astype(np.int64) if matrices else None,
    )
