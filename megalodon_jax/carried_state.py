"""The state of a run's training rows between two batches (`data.carry_state`)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.cache import CarriedState, carried_shardings
from megalodon_jax.config import ModelConfig, TrainConfig
from megalodon_jax.model import Megalodon
from megalodon_jax.parallel.mesh import resolve_mesh


def abstract_carried_state(config: TrainConfig, mesh: Mesh | None = None) -> CarriedState | None:
    """Shapes, dtypes and shardings of the state; None without `data.carry_state`.

    Args:
      config: the run.
      mesh: devices; None: those of `config.mesh`.
    """
    model = config.model
    if not config.data.carry_state or not isinstance(model, ModelConfig):
        return None

    def init() -> CarriedState:
        return Megalodon(model, rngs=nnx.Rngs(0)).init_carried_state(config.data.batch_size)

    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(init),
        carried_shardings(resolve_mesh(config, mesh), model),
    )


def fresh_carried_state(config: TrainConfig, mesh: Mesh | None = None) -> CarriedState | None:
    """The state of rows that start with a new document; arguments as above."""
    abstract = abstract_carried_state(config, mesh)
    if abstract is None:
        return None

    def zeros() -> CarriedState:
        # Segment 0 is no document's, so that every row starts from the model's initial state.
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)

    return jax.jit(zeros, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def resumed_carried_state(
    config: TrainConfig, mesh: Mesh | None, saved: CarriedState | None
) -> CarriedState | None:
    """A saved state in the layout of `config`; a fresh one if nothing was saved."""
    if saved is None or not isinstance(config.model, ModelConfig):
        return fresh_carried_state(config, mesh)
    layout = partial(CarriedState.with_layout, stacked=config.model.scan_layers)
    shardings = carried_shardings(resolve_mesh(config, mesh), config.model)
    return jax.jit(layout, out_shardings=shardings)(saved)
