"""Masked language modeling: an encoder finds hidden tokens of running text (Devlin et al. 2019)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from megalodon_jax.config import AnyEncoderConfig, TrainConfig
from megalodon_jax.encoder_model import EncoderModel
from megalodon_jax.errors import ConfigError
from megalodon_jax.evaluation.summary import Evaluation, summarize
from megalodon_jax.loss import LossOutput, cross_entropy
from megalodon_jax.tasks.language import LanguageModeling
from megalodon_jax.typing import Array, Batch, PRNGKey

# Shares of the chosen tokens that the mask hides, or another token replaces; the others stay.
HIDDEN, REPLACED = 0.8, 0.1
_EVALUATION_SEED = 0


class MaskedLanguageModeling(LanguageModeling):
    """Cross-entropy of chosen tokens, which see the whole document on both sides.

    A fraction of tokens (`examples.mask_fraction`) is chosen; 80 % of them become the mask, the
    last id of the vocabulary, 10 % another token, and 10 % stay. Rows are those of language
    modeling. The methods are documented in `Task`.
    """

    needs_key = True

    def open_loaders(self, config, tokenizer, *, rows, num_shards):
        """Packed rows of text, and those of the held-out sets."""
        model = config.model
        if isinstance(model, AnyEncoderConfig) and tokenizer.vocab_size >= model.vocab_size:
            raise ConfigError(
                f"tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} ids, and the mask "
                f"takes one more; set model.vocab_size to {tokenizer.vocab_size + 1} or more"
            )
        return super().open_loaders(config, tokenizer, rows=rows, num_shards=num_shards)

    def loss(
        self,
        model: EncoderModel,
        batch: Batch,
        *,
        config: TrainConfig,
        dropout_key: PRNGKey | None = None,
    ) -> LossOutput:
        """Cross-entropy of the chosen tokens; without a key the choice is that of a fixed seed."""
        key = jax.random.key(_EVALUATION_SEED) if dropout_key is None else dropout_key
        mask_key, model_key = jax.random.split(key)
        tokens, chosen = mask_tokens(
            batch, mask_key, config.examples.mask_fraction, config.model.vocab_size
        )
        hidden = model.hidden(
            tokens,
            segment_ids=batch.segment_ids,
            max_documents=1 if config.data.packing == "pad" else batch.tokens.shape[1],
            dropout_key=None if dropout_key is None else model_key,
        )
        sums = cross_entropy(
            hidden,
            model.output_matrix(),
            batch.tokens,
            chosen.astype(jnp.float32),
            z_loss=config.z_loss,
            chunk_size=config.loss_chunk_size,
        )
        count = jnp.sum((batch.segment_ids != 0).astype(jnp.float32))
        return sums._replace(num_tokens=count)

    def metric(self, sums: Sequence[LossOutput], num_bytes: int | None) -> Evaluation:
        """Loss, perplexity and accuracy of the chosen tokens."""
        del num_bytes
        evaluation = summarize(sums, None)
        correct = math.fsum(float(batch.correct_sum) for batch in sums)
        return evaluation._replace(accuracy=correct / evaluation.num_tokens)


def mask_tokens(
    batch: Batch, key: PRNGKey, fraction: float, vocab_size: int
) -> tuple[Array, Array]:
    """The tokens with some of them hidden, and where they were chosen.

    Args:
      batch: rows of text.
      key: of the choice.
      fraction: of tokens that are chosen.
      vocab_size: ids of the model; the last one is the mask.
    """
    shape = batch.tokens.shape
    choice_key, kind_key, token_key = jax.random.split(key, 3)
    is_token = batch.segment_ids != 0
    chosen = jax.random.bernoulli(choice_key, fraction, shape) & is_token
    kind = jax.random.uniform(kind_key, shape)
    other = jax.random.randint(token_key, shape, 0, vocab_size - 1)
    tokens = jnp.where(kind < HIDDEN + REPLACED, other, batch.tokens)
    tokens = jnp.where(kind < HIDDEN, vocab_size - 1, tokens)
    return jnp.where(chosen, tokens, batch.tokens), chosen
