"""Callbacks: your own code at the events of a run."""

from collections.abc import Mapping

from flax import nnx

from megalodon_jax.config import TrainConfig
from megalodon_jax.evaluation.summary import Evaluation
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.lora import merge_lora
from megalodon_jax.train_state import TrainState
from megalodon_jax.training.result import TrainResult
from megalodon_jax.training.step import StepMetrics


class RunView:
    """A run as its callbacks see it.

    Attributes:
      config: the run's settings.
      step: number of updates so far.
      state: parameters, optimizer and guard after them; the next step donates these arrays.
    """

    def __init__(self, config: TrainConfig, graphdef: nnx.GraphDef, state: TrainState) -> None:
        self.config = config
        self.state = state
        self.step = int(state.step)
        self.is_stopped = False
        self._graphdef = graphdef

    def model(self) -> LanguageModel:
        """The model with the parameters that evaluations take, valid until the next step.

        LoRA factors are merged into their kernels.
        """
        return merge_lora(nnx.merge(self._graphdef, self.state.evaluated_params))

    def stop(self) -> None:
        """Ends the run after this step as if it were the last one: saved, evaluated, sampled.

        In a multi-process run every process must call it after the same step.
        """
        self.is_stopped = True


class Callback:
    """Override the events that you need; every process calls them, in the main thread.

    An exception ends the run as any error does: the newest checkpoint stays.
    """

    def on_start(self, run: RunView) -> None:
        """The state is initialized or restored; no update of this process has begun."""

    def on_step(self, run: RunView, metrics: StepMetrics) -> None:
        """An update was handed to the devices; reading `metrics` waits for it."""

    def on_report(self, run: RunView, metrics: Mapping[str, float | None]) -> None:
        """Every `log_every` steps: the values that are written to `metrics.jsonl`."""

    def on_evaluation(self, run: RunView, evaluation: Evaluation) -> None:
        """A held-out evaluation has ended."""

    def on_save(self, run: RunView) -> None:
        """The save of a checkpoint of this step has begun."""

    def on_end(self, run: RunView, result: TrainResult) -> None:
        """The run has ended, by its last step, a signal or `RunView.stop`."""
