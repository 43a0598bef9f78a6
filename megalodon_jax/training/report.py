"""The steps between two reports: their metrics, and what the guard did in them."""

import math
from collections.abc import Callable

import jax
import numpy as np

from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import TrainingError
from megalodon_jax.training.metrics import ProgressDisplay, RunLog
from megalodon_jax.training.step import StepMetrics

_ADVICE = "Try a lower optim.lr, a longer warmup, or clipping"


class ReportWindow:
    """Metrics of the steps since the last report, first on the device, then on the host.

    Args:
      config: the run.
      display: progress on the terminal.
      log: output of metrics; None except in process 0.
      newest_checkpoint: says which checkpoint is the newest.
      step: number of updates so far.
    """

    def __init__(
        self,
        config: TrainConfig,
        display: ProgressDisplay,
        log: RunLog | None,
        *,
        newest_checkpoint: Callable[[], str],
        step: int,
    ) -> None:
        self._config = config
        self._display = display
        self._log = log
        self._newest_checkpoint = newest_checkpoint
        self._step = step
        self._on_device: list[StepMetrics] = []
        self._checked: list[StepMetrics] = []
        self.finite_loss_step: int | None = None
        """Number of updates before the last finite loss; None: there was none."""

    def append(self, metrics: StepMetrics) -> None:
        """Adds the metrics of the next update."""
        self._on_device.append(metrics)

    def check(self) -> None:
        """Fetches the metrics of new steps; reports skipped updates and spikes.

        Raises:
          TrainingError: parameters are not finite, too many updates in a row were skipped, or a
            spike stops the run.
        """
        fetched = jax.device_get(self._on_device)
        self._on_device = []
        for metrics in fetched:
            self._step += 1
            self._checked.append(metrics)
            if math.isfinite(metrics.loss):
                self.finite_loss_step = self._step - 1
            self._check(metrics)

    def take(self) -> list[StepMetrics]:
        """The checked metrics of all steps since the last call."""
        self.check()
        taken, self._checked = self._checked, []
        return taken

    def _check(self, metrics: StepMetrics) -> None:
        config, values = self._config, _values(metrics)
        if not math.isfinite(metrics.max_param):
            self._stop(f"{values} at step {self._step}; the parameters are not finite")
        if metrics.skipped_in_row > config.max_skipped_updates:
            self._stop(
                f"{values} at step {self._step}; {metrics.skipped_in_row} updates in a row were "
                f"skipped, max_skipped_updates is {config.max_skipped_updates}"
            )
        if metrics.verdict.is_spike and config.on_spike == "stop":
            self._stop(f"spike: {values} at step {self._step}, and on_spike is 'stop'")
        if metrics.verdict.is_spike:
            action = "skipped" if metrics.verdict.is_skipped else "applied"
            self._note("spike", f"spike, {values}; update {action}", metrics)
        elif metrics.verdict.is_skipped:
            text = f"update skipped, {values}, largest parameter {metrics.max_param:.4g}"
            if math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm):
                text += f": at learning rate {metrics.learning_rate:.4g} it may overflow"
            self._note("skipped", text, metrics)

    def _note(self, event: str, text: str, metrics: StepMetrics) -> None:
        self._display.message(f"step {self._step}: {text}")
        if self._log is not None:
            self._log.write(
                self._step,
                {
                    f"{event}_loss": float(metrics.loss),
                    f"{event}_grad_norm": float(metrics.grad_norm),
                },
            )

    def _stop(self, text: str) -> None:
        raise TrainingError(f"{text}; {self._newest_checkpoint()}. {_ADVICE}")


def _values(metrics: StepMetrics) -> str:
    return f"loss is {metrics.loss:.6g} and gradient norm {metrics.grad_norm:.6g}"


def mean_metrics(window: list[StepMetrics]) -> dict[str, float]:
    """Means over the tokens of all steps with a finite loss, and the last step's other metrics."""
    finite = [metrics for metrics in window if math.isfinite(metrics.loss)]
    total = max(float(np.sum([metrics.tokens for metrics in finite])), 1.0)
    means = {
        name: float(sum(getattr(metrics, name) * metrics.tokens for metrics in finite)) / total
        for name in ("loss", "z_loss", "accuracy")
    }
    last = window[-1]
    return {
        **(means if finite else dict.fromkeys(means, math.nan)),
        "grad_norm": float(last.grad_norm),
        "learning_rate": float(last.learning_rate),
        "max_param": float(last.max_param),
        "skipped_updates": float(last.skipped),
        "spiked_updates": float(last.spiked),
        "tokens": float(np.sum([metrics.tokens for metrics in window])),
        **({} if last.input_tokens is None else {"input_tokens": _processed_tokens(window)}),
        **({} if last.carried is None else {"carried_tokens": _carried_fraction(window)}),
    }


def _processed_tokens(window: list[StepMetrics]) -> float:
    return float(np.sum([metrics.processed_tokens for metrics in window]))


def _carried_fraction(window: list[StepMetrics]) -> float:
    """The fraction of the window's tokens in documents that began in an earlier row."""
    tokens = np.array([metrics.tokens for metrics in window], np.float64)
    carried = np.array([metrics.carried for metrics in window], np.float64)
    return float(carried @ tokens) / max(float(tokens.sum()), 1.0)
