"""The train state: step, parameters, optimizer state and guard, with their shardings."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import UInt32

from megalodon_jax.cache import CarriedState
from megalodon_jax.carried_state import (
    abstract_carried_state,
    fresh_carried_state,
    resumed_carried_state,
)
from megalodon_jax.config import TrainConfig
from megalodon_jax.lora import add_lora
from megalodon_jax.models import build_model
from megalodon_jax.optimizer import (
    ScheduleValues,
    first_moments,
    make_optimizer,
    schedule_values,
)
from megalodon_jax.parallel.mesh import resolve_mesh
from megalodon_jax.parallel.sharding import shardings_of, with_shardings
from megalodon_jax.typing import Array, Int32, PRNGKey
from megalodon_jax.update_guard import GuardState, init_guard


class RunValues(NamedTuple):
    """Numbers of a run's configuration that a train step reads.

    They are arguments of the compiled step, not part of its program: runs that differ in them alone
    (learning rates, number of steps, seed) find it in the compilation cache. Checkpoints leave them
    out; a resumed run takes those of its configuration.

    Attributes:
      schedule: of the learning rate, float32.
      seed: of dropout and of other random numbers.
    """

    schedule: ScheduleValues
    seed: UInt32[Array, ""]


class TrainState(NamedTuple):
    """The state that a train step updates.

    Attributes:
      step: number of updates so far.
      params: the parameters that an update may change: the model's, or the factors of LoRA.
      opt_state: the optimizer's moments (float32) and counts.
      guard: recent losses and gradient norms, and counts of skipped updates and of spikes.
      average: the exponential moving average of `params` (float32); None without.
      carried: the streaming state at the end of every training row, see `data.carry_state`; None
        without.
      base: the frozen parameters of a run with LoRA, which its checkpoints leave out; else None.
      values: numbers of the configuration, which a step returns as they are.
    """

    step: Int32[Array, ""]
    params: nnx.State
    opt_state: optax.OptState
    guard: GuardState
    average: nnx.State | None = None
    carried: CarriedState | None = None
    base: nnx.State | None = None
    values: RunValues | None = None

    @property
    def evaluated_params(self) -> nnx.State:
        """All parameters that evaluations take: the average where there is one."""
        return join_params(self.params if self.average is None else self.average, self.base)


def join_params(params: nnx.State, base: nnx.State | None) -> nnx.State:
    """All parameters of a model, from the trained and the frozen ones of a `TrainState`."""
    return params if base is None else nnx.merge_state(base, params)


def init_state(
    config: TrainConfig,
    mesh: Mesh | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    base: nnx.State | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
    """Initializes parameters from `config.seed` and the optimizer state, directly sharded.

    Initial values do not depend on the mesh.

    Args:
      config: the run.
      mesh: devices; None: those of `config.mesh`.
      optimizer: an optimizer instead of that of `config.optim`; None: that one.
      base: the sharded frozen parameters of a run with LoRA; None: random ones.

    Returns:
      The model's static structure and the state of step 0.
    """
    mesh = resolve_mesh(config, mesh)
    shardings = state_shardings(config, mesh, optimizer=optimizer)
    used = optimizer_of(config, optimizer)

    needs_base = base is None
    values = run_values(config, mesh)

    @partial(jax.jit, out_shardings=(*shardings[:3], shardings.base if needs_base else None))
    def create(seed) -> tuple[Int32[Array, ""], nnx.State, optax.OptState, nnx.State | None]:
        _, params, frozen = _split_model(config, jax.random.key(seed))
        frozen = frozen if needs_base else None
        return jnp.zeros((), jnp.int32), params, used.init(params), frozen

    step, params, opt_state, frozen = create(values.seed)
    # A program of its own: fused into the initialization it would change how weights are rounded.
    guard = fresh_guard(config, params, opt_state, mesh)
    average = fresh_average(config, params, mesh)
    state = TrainState(
        step,
        params,
        opt_state,
        guard,
        average,
        carried=fresh_carried_state(config, mesh),
        base=frozen if needs_base else base,
        values=values,
    )
    return abstract_run_model(config)[0], state


class RunModel(NamedTuple):
    """The model of a run: its static structure, the trained parameters, and the frozen base."""

    graphdef: nnx.GraphDef
    params: nnx.State
    base: nnx.State | None


def abstract_run_model(config: TrainConfig) -> RunModel:
    """The model of a run, factors of LoRA included, with shapes and dtypes in place of arrays."""
    found: list[nnx.GraphDef] = []

    def split() -> tuple[nnx.State, nnx.State | None]:
        graphdef, params, base = _split_model(config, jax.random.key(config.seed))
        found.append(graphdef)
        return params, base

    params, base = jax.eval_shape(split)
    return RunModel(found[0], params, base)


def _split_model(config: TrainConfig, key: PRNGKey) -> RunModel:
    rngs = nnx.Rngs(key)
    model = build_model(config.model, rngs=rngs)
    if not config.lora.rank:
        graphdef, params = nnx.split(model, nnx.Param)
        return RunModel(graphdef, params, None)
    add_lora(model, config.lora, rngs=rngs)
    graphdef, params, base = nnx.split(model, nnx.LoRAParam, nnx.Param)
    return RunModel(graphdef, params, base)


def run_values(config: TrainConfig, mesh: Mesh | None = None) -> RunValues:
    """The numbers of a configuration that a train step reads, on every device of the mesh."""
    everywhere = NamedSharding(resolve_mesh(config, mesh), PartitionSpec())
    return jax.tree.map(
        lambda value: jax.make_array_from_callback((), everywhere, lambda _: value),
        _host_values(config),
    )


def _host_values(config: TrainConfig) -> RunValues:
    schedule = schedule_values(config.optim, total_steps=config.steps)
    seed: Any = np.asarray(config.seed, np.uint32)
    return RunValues(jax.tree.map(np.asarray, schedule), seed)


def fresh_average(
    config: TrainConfig, params: nnx.State, mesh: Mesh | None = None
) -> nnx.State | None:
    """The average of a run that starts from these parameters; None without `ema_decay`."""
    if not config.optim.ema_decay:
        return None
    shardings = state_shardings(config, resolve_mesh(config, mesh)).average
    return jax.jit(_float32_copy, out_shardings=shardings)(params)


def _float32_copy(params: nnx.State) -> nnx.State:
    # Copies of float32 parameters too: the train step donates both.
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)


def fresh_guard(
    config: TrainConfig, params: nnx.State, opt_state: optax.OptState, mesh: Mesh | None = None
) -> GuardState:
    """The guard of a run that goes on from other parameters or from a state without a guard.

    Args:
      config: the run.
      params: the sharded parameters.
      opt_state: the optimizer state that goes with them.
      mesh: devices; None: those of `config.mesh`.
    """
    shardings = state_shardings(config, resolve_mesh(config, mesh)).guard
    init = jax.jit(partial(init_guard, config), out_shardings=shardings)
    return init(params, first_moments(opt_state))


def resumed_state(
    config: TrainConfig,
    mesh: Mesh | None,
    *,
    step: Int32[Array, ""],
    params: nnx.State,
    opt_state: optax.OptState,
    guard: GuardState | None,
    average: nnx.State | None,
    carried: CarriedState | None = None,
) -> TrainState:
    """The state of a resumed run, from restored arrays.

    A guard of another `spike_window` keeps its counts and starts an empty window.

    Args:
      config: the run.
      mesh: devices; None: those of `config.mesh`.
      step: number of updates so far.
      params: the parameters.
      opt_state: the optimizer's state.
      guard: the saved guard; None: the checkpoint has none.
      average: the saved average; None: it begins with these parameters, if the run has one.
      carried: the saved state of the rows; None: rows start anew, if the run carries a state.
    """
    if guard is None or guard.losses.shape != (config.spike_window,):
        fresh = fresh_guard(config, params, opt_state, mesh)
        counts = () if guard is None else ("skipped", "skipped_in_row", "spiked")
        guard = fresh._replace(**{name: getattr(guard, name) for name in counts})
    if average is None:
        average = fresh_average(config, params, mesh)
    carried = resumed_carried_state(config, mesh, carried)
    values = run_values(config, mesh)
    return TrainState(step, params, opt_state, guard, average, carried, values=values)


def optimizer_of(
    config: TrainConfig,
    optimizer: optax.GradientTransformation | None = None,
    values: RunValues | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a run: the given one, else that of `config.optim` with these values."""
    if optimizer is not None:
        return optimizer
    schedule = None if values is None else values.schedule
    return make_optimizer(config.optim, total_steps=config.steps, values=schedule)


def state_shardings(
    config: TrainConfig, mesh: Mesh, *, optimizer: optax.GradientTransformation | None = None
) -> TrainState:
    """The shardings of a run's state; `optimizer` as in `init_state`."""
    shardings = shardings_of(_abstract_state(config, optimizer), mesh)
    carried = abstract_carried_state(config, mesh)
    return shardings._replace(carried=jax.tree.map(lambda leaf: leaf.sharding, carried))


def abstract_state(
    config: TrainConfig,
    mesh: Mesh | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of a run's `TrainState`, without allocation.

    The arguments are those of `init_state`.
    """
    mesh = resolve_mesh(config, mesh)
    state = with_shardings(_abstract_state(config, optimizer), mesh)
    return state._replace(carried=abstract_carried_state(config, mesh))


def _abstract_state(
    config: TrainConfig, optimizer: optax.GradientTransformation | None
) -> TrainState:
    """Shapes and dtypes of all but the state of the rows."""
    used = optimizer_of(config, optimizer)

    def init(params: nnx.State, base: nnx.State | None) -> TrainState:
        opt_state = used.init(params)
        guard = init_guard(config, params, first_moments(opt_state))
        average = _float32_copy(params) if config.optim.ema_decay else None
        step = jnp.zeros((), jnp.int32)
        values = jax.tree.map(jnp.asarray, _host_values(config))
        return TrainState(step, params, opt_state, guard, average, base=base, values=values)

    return jax.eval_shape(init, *abstract_run_model(config)[1:])
