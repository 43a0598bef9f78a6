"""The state from which a run starts: fresh, from the weights of another run, or resumed."""

import optax
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.checkpoints import RunCheckpoints, load_params, restore_for_resume
from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.models import abstract_model
from megalodon_jax.tasks import TrainingLoader
from megalodon_jax.train_state import TrainState, fresh_average, fresh_guard, init_state


def initial_state(
    config: TrainConfig,
    mesh: Mesh,
    loader: TrainingLoader,
    checkpoints: RunCheckpoints,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[nnx.GraphDef, TrainState, TrainConfig | None]:
    """The model's structure, the state, and of a resumed run its saved configuration."""
    if not config.resume:
        if steps := checkpoints.steps():
            raise ConfigError(
                f"{config.run_dir} already has checkpoints (newest: step {steps[-1]}), which are "
                "not overwritten; resume with --resume, or choose another --run_dir"
            )
        graphdef, state = init_state(config, mesh, optimizer=optimizer)
        if config.init_from:
            params = load_params(config.init_from, config, mesh)
            guard = fresh_guard(config, params, state.opt_state, mesh)
            average = fresh_average(config, params, mesh)
            state = state._replace(params=params, guard=guard, average=average)
        return graphdef, state, None
    restored = restore_for_resume(
        checkpoints, config, mesh, load_data=loader.load_state_dict, optimizer=optimizer
    )
    return abstract_model(config.model)[0], restored.state, restored.config
