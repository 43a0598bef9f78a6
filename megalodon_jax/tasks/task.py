"""The protocol of a task."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from megalodon_jax.cache import CarriedState
from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.evaluation.summary import Evaluation
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.loss import LossOutput
from megalodon_jax.tasks.loaders import HeldoutLoader, TrainingLoader
from megalodon_jax.typing import Batch, PRNGKey

if TYPE_CHECKING:
    # Training steps and benchmarks run without the data libraries.
    from megalodon_jax.data.tokenizer import Tokenizer


class Task(Protocol):
    """Examples, a loss and a metric; everything else belongs to the trainer."""

    def open_loaders(
        self, config: TrainConfig, tokenizer: "Tokenizer", *, rows: Sequence[int], num_shards: int
    ) -> "tuple[TrainingLoader, Mapping[str, HeldoutLoader]]":
        """Examples: the loader of training, without end, and held-out passes by name.

        A held-out set that is the only one may have the name "".

        Args:
          config: the run.
          tokenizer: from text to token ids.
          rows: rows of the global batch that this process loads.
          num_shards: shards of the data if the configuration does not say.

        Raises:
          ConfigError: the settings do not fit this task.
          DataError: the data cannot be read or is empty.
        """
        ...

    def loss(
        self,
        model: Any,
        batch: Batch,
        *,
        config: TrainConfig,
        dropout_key: PRNGKey | None = None,
    ) -> LossOutput:
        """Sums of the loss over one batch, inside `jit`; training divides by `weight_sum`.

        The model is that of the run: a `LanguageModel`, or an `EncoderModel`.
        """
        ...

    def metric(self, sums: Sequence[LossOutput], num_bytes: int | None) -> Evaluation:
        """The result of a held-out pass.

        Args:
          sums: `loss` of every batch.
          num_bytes: UTF-8 bytes of the text in them; None: not known.
        """
        ...


class StatefulTask(Task, Protocol):
    """A task whose training rows may continue those of the batch before (`data.carry_state`)."""

    def loss_with_state(
        self,
        model: LanguageModel,
        batch: Batch,
        state: CarriedState,
        *,
        config: TrainConfig,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[LossOutput, CarriedState]:
        """Sums of the loss, and the state after the rows.

        Args:
          model: the model.
          batch: numbered as `Batch` says of `data.carry_state`.
          state: the state before the rows; the model takes it as `cache` and returns the next one.
          config: the run.
          dropout_key: turns dropout on.
        """
        ...


def find_stateful(task: Task) -> StatefulTask:
    """The task as one with `loss_with_state`.

    Raises:
      ConfigError: it has none, or changes `loss` and not `loss_with_state`.
    """
    kinds = type(task).__mro__
    first = {
        name: next((i for i, kind in enumerate(kinds) if name in vars(kind)), len(kinds))
        for name in ("loss", "loss_with_state")
    }
    if not hasattr(task, "loss_with_state") or first["loss"] < first["loss_with_state"]:
        raise ConfigError(
            f"data.carry_state is set, but {type(task).__name__} defines its loss for rows that do "
            "not follow each other; define loss_with_state too, or use carry_state = false"
        )
    return cast(StatefulTask, task)
