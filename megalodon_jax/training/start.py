"""The state from which a run starts: fresh, from trained weights, or resumed."""

from typing import Any, NamedTuple

import optax
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.checkpoints import RestoredRun, RunCheckpoints, restore_for_resume
from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import CheckpointError, ConfigError
from megalodon_jax.interop.initial_weights import read_base, read_initial_weights
from megalodon_jax.tasks import TrainingLoader
from megalodon_jax.train_state import (
    TrainState,
    abstract_run_model,
    fresh_average,
    fresh_guard,
    init_state,
)
from megalodon_jax.training.run_context import changed_settings


class InitialState(NamedTuple):
    """The start of a run.

    Attributes:
      graphdef: the model's static structure.
      state: parameters and optimizer.
      changes: settings that differ from those of the resumed checkpoint or of the weights in
        `init_from`: old and new values.
    """

    graphdef: nnx.GraphDef
    state: TrainState
    changes: dict[str, tuple[Any, Any]]


def initial_state(
    config: TrainConfig,
    mesh: Mesh,
    loader: TrainingLoader,
    checkpoints: RunCheckpoints,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> InitialState:
    """The state of a run; the checkpoints of a run with LoRA will record its base."""
    if config.resume:
        restored = restore_for_resume(
            checkpoints, config, mesh, load_data=loader.load_state_dict, optimizer=optimizer
        )
        state = restored.state
        if config.lora.rank:
            state = state._replace(base=_base_of_resumed(restored, config, mesh, checkpoints))
        changes = changed_settings(restored.config, config)
        return InitialState(abstract_run_model(config).graphdef, state, changes)
    if steps := checkpoints.steps():
        raise ConfigError(
            f"{config.run_dir} already has checkpoints (newest: step {steps[-1]}), which are "
            "not overwritten; resume with --resume, or choose another --run_dir"
        )
    if not config.init_from:
        return InitialState(*init_state(config, mesh, optimizer=optimizer), {})
    if config.lora.rank:
        weights = read_initial_weights(config.init_from, config, mesh)
        checkpoints.keep_base(weights.record())
        started = init_state(config, mesh, optimizer=optimizer, base=weights.params)
        return InitialState(*started, weights.changes)
    graphdef, state = init_state(config, mesh, optimizer=optimizer)
    weights = read_initial_weights(config.init_from, config, mesh)
    params = weights.params
    guard = fresh_guard(config, params, state.opt_state, mesh)
    average = fresh_average(config, params, mesh)
    state = state._replace(params=params, guard=guard, average=average)
    return InitialState(graphdef, state, weights.changes)


def _base_of_resumed(
    restored: RestoredRun, config: TrainConfig, mesh: Mesh, checkpoints: RunCheckpoints
) -> nnx.State:
    """The base of a resumed run: the checkpoint that it has read, or another `init_from`."""
    record = restored.base
    if record is None:
        raise CheckpointError(f"the checkpoint in {config.run_dir} does not name its base")
    is_moved = config.init_from != restored.config.init_from
    base = read_base(record, config, mesh, path=config.init_from if is_moved else "")
    checkpoints.keep_base(base.record)
    return base.params
