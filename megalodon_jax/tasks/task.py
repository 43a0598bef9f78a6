"""The protocol of a task."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from megalodon_jax.config import TrainConfig
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
        model: LanguageModel,
        batch: Batch,
        *,
        config: TrainConfig,
        dropout_key: PRNGKey | None = None,
    ) -> LossOutput:
        """Sums of the loss over one batch, inside `jit`; training divides by `weight_sum`."""
        ...

    def metric(self, sums: Sequence[LossOutput], num_bytes: int | None) -> Evaluation:
        """The result of a held-out pass.

        Args:
          sums: `loss` of every batch.
          num_bytes: UTF-8 bytes of the text in them; None: not known.
        """
        ...
