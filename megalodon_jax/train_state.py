"""The train state: step, parameters and optimizer state, with their shardings."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.config import TrainConfig
from megalodon_jax.models import abstract_model, build_model
from megalodon_jax.optimizer import make_optimizer
from megalodon_jax.parallel.mesh import resolve_mesh
from megalodon_jax.parallel.sharding import shardings_of
from megalodon_jax.typing import Array, Int32


class TrainState(NamedTuple):
    """The state that a train step updates.

    Attributes:
      step: number of updates so far.
      params: the model's parameters, `nnx.split(model, nnx.Param)[1]`.
      opt_state: the optimizer's moments (float32) and counts.
    """

    step: Int32[Array, ""]
    params: nnx.State
    opt_state: optax.OptState


def init_state(config: TrainConfig, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, TrainState]:
    """Initializes parameters from `config.seed` and the optimizer state, directly sharded.

    Initial values do not depend on the mesh.

    Args:
      config: the run.
      mesh: devices; None: those of `config.mesh`.

    Returns:
      The model's static structure and the state of step 0.
    """
    mesh = resolve_mesh(config, mesh)
    optimizer = make_optimizer(config.optim, total_steps=config.steps)
    graphdef = abstract_model(config.model)[0]

    @partial(jax.jit, out_shardings=state_shardings(config, mesh))
    def create() -> TrainState:
        params = nnx.split(build_model(config.model, rngs=nnx.Rngs(config.seed)), nnx.Param)[1]
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return graphdef, create()


def state_shardings(config: TrainConfig, mesh: Mesh) -> TrainState:
    """The shardings of a run's state."""
    return shardings_of(_abstract_state(config), mesh)


def abstract_state(config: TrainConfig, mesh: Mesh | None = None) -> TrainState:
    """Shapes, dtypes and shardings of a run's `TrainState`, without allocation."""
    mesh = resolve_mesh(config, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        _abstract_state(config),
        state_shardings(config, mesh),
    )


def _abstract_state(config: TrainConfig) -> TrainState:
    optimizer = make_optimizer(config.optim, total_steps=config.steps)
    params = abstract_model(config.model)[1]

    def init(params: nnx.State) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.eval_shape(init, params)
