"""Language modeling, the default task: predict the next token of packed documents."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megalodon_jax.cache import CarriedState
from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.evaluation.summary import Evaluation, summarize
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.loss import LossOutput, cross_entropy
from megalodon_jax.typing import Batch, PRNGKey

if TYPE_CHECKING:
    from megalodon_jax.data.loader import Loader
    from megalodon_jax.data.tokenizer import Tokenizer


class LanguageModeling:
    """Next-token prediction; the methods are documented in `Task`."""

    def open_loaders(
        self, config: TrainConfig, tokenizer: "Tokenizer", *, rows: Sequence[int], num_shards: int
    ) -> "tuple[Loader, dict[str, Loader]]":
        """Packed rows of text, and those of the held-out sets, of which there may be none."""
        # Here, so that training steps and benchmarks run without the data libraries.
        from megalodon_jax.data.loader import make_loader
        from megalodon_jax.data.open_source import heldout_names

        check_vocabulary(tokenizer, config)
        data, rows = config.data, tuple(rows)
        training = make_loader(
            data, tokenizer, "train", rows=rows, default_shards=num_shards, repeat=True
        )
        return training, {
            name: make_loader(data, tokenizer, "heldout", rows=rows, repeat=False, name=name)
            for name in heldout_names(data)
        }

    def loss(
        self,
        model: LanguageModel,
        batch: Batch,
        *,
        config: TrainConfig,
        dropout_key: PRNGKey | None = None,
    ) -> LossOutput:
        """Cross-entropy of the next token."""
        return self._loss_and_state(model, batch, None, config, dropout_key)[0]

    def loss_with_state(
        self,
        model: LanguageModel,
        batch: Batch,
        state: CarriedState,
        *,
        config: TrainConfig,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[LossOutput, CarriedState]:
        """Cross-entropy of the next token in rows that continue those of the batch before."""
        return self._loss_and_state(model, batch, state, config, dropout_key)

    def _loss_and_state[S: CarriedState | None](
        self,
        model: LanguageModel,
        batch: Batch,
        state: S,
        config: TrainConfig,
        dropout_key: PRNGKey | None,
    ) -> tuple[LossOutput, S]:
        hidden, state = model.hidden(
            batch.tokens, segment_ids=batch.segment_ids, cache=state, dropout_key=dropout_key
        )
        sums = cross_entropy(
            hidden,
            model.output_matrix(),
            batch.targets,
            batch.weights,
            z_loss=config.z_loss,
            chunk_size=config.loss_chunk_size,
        )
        return sums, state

    def metric(self, sums: Sequence[LossOutput], num_bytes: int | None) -> Evaluation:
        """Loss, perplexity and bits per byte."""
        return summarize(sums, num_bytes)


def check_vocabulary(tokenizer: "Tokenizer", config: TrainConfig) -> None:
    """Raises `ConfigError` if the tokenizer has ids that the model does not know."""
    known = min(config.model.vocab_size, config.model.num_outputs)
    if tokenizer.vocab_size > known:
        raise ConfigError(
            f"tokenizer {config.data.tokenizer!r} has token ids up to {tokenizer.vocab_size - 1}, "
            f"but the model knows 0 to {known - 1}; set model.vocab_size to {tokenizer.vocab_size} "
            "or more"
        )
