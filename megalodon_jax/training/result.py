"""The result of a run."""

import signal
from typing import NamedTuple

from megalodon_jax.evaluation.summary import Evaluation


class TrainResult(NamedTuple):
    """The result of a run.

    Attributes:
      step: total number of updates.
      train_loss: loss of the last step in nats per token; None if no step was run.
      heldout: the final held-out evaluation; None without held-out text or after a signal.
      sample: the generated text with its prompt; empty if `sample_tokens` is 0.
      stop_signal: SIGINT or SIGTERM if it stopped the run before its end, else None.
    """

    step: int
    train_loss: float | None
    heldout: Evaluation | None
    sample: str
    stop_signal: signal.Signals | None
