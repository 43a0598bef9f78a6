"""Loss of a batch whose rows may continue those of the batch before (`data.carry_state`)."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from megalodon_jax.cache import MAX_POSITION, CarriedState
from megalodon_jax.config import TrainConfig
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.loss import LossOutput
from megalodon_jax.tasks import Task, find_stateful
from megalodon_jax.typing import Array, Batch, Bool, Float32, PRNGKey


class RowsLoss(NamedTuple):
    """The loss of a batch and the state after its rows.

    Attributes:
      sums: of the loss.
      num_carried: sum of the weights in documents that began in an earlier row; None without
        `data.carry_state`.
      state: after the rows; None without.
    """

    sums: LossOutput
    num_carried: Float32[Array, ""] | None
    state: CarriedState | None


LossOfRows = Callable[[LanguageModel, Batch, CarriedState | None, PRNGKey | None], RowsLoss]


def make_loss(task: Task, config: TrainConfig) -> LossOfRows:
    """The loss of a run's training batches, given the state before the rows.

    Raises:
      ConfigError: the run carries a state, and the task has no loss with one.
    """
    stateful = find_stateful(task) if config.data.carry_state else None

    def loss(
        model: LanguageModel, batch: Batch, state: CarriedState | None, key: PRNGKey | None
    ) -> RowsLoss:
        if stateful is None or state is None:
            sums = task.loss(model, batch, config=config, dropout_key=key)
            return RowsLoss(sums, None, None)
        if batch.segment_ids is None:
            batch = batch._replace(segment_ids=jnp.ones_like(batch.tokens))
        length = batch.tokens.shape[1]
        state = start_new(state, state.position > MAX_POSITION - length)
        is_carried = (batch.segment_ids == 1) & (state.segment == 1)[:, None]
        sums, after = stateful.loss_with_state(model, batch, state, config=config, dropout_key=key)
        # The document of a row's last token is number 1 of the next row if it goes on there.
        after = dataclasses.replace(after, segment=jnp.minimum(after.segment, 1))
        return RowsLoss(sums, jnp.sum(jnp.where(is_carried, batch.weights, 0.0)), after)

    return loss


def start_new(state: CarriedState, rows: Bool[Array, "#B"]) -> CarriedState:
    """The state in which some rows begin their next token's document anew.

    A row whose segment is 0 takes none of its states; keys and values are read only up to a row's
    position, so that nothing of their size is written.
    """
    return dataclasses.replace(
        state,
        position=jnp.where(rows, 0, state.position),
        segment=jnp.where(rows, 0, state.segment),
    )
