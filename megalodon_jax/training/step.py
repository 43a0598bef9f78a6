"""The train step and the evaluation step as pure jitted functions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.config import TrainConfig
from megalodon_jax.evaluation.summary import EvalStep
from megalodon_jax.loss import LossOutput
from megalodon_jax.optimizer import (
    apply_updates,
    learning_rate_schedule,
    stop_frozen_gradients,
    update_average,
)
from megalodon_jax.parallel.mesh import resolve_mesh
from megalodon_jax.parallel.sharding import batch_sharding
from megalodon_jax.tasks import Task, find_task
from megalodon_jax.train_state import TrainState, join_params, optimizer_of, state_shardings
from megalodon_jax.typing import Array, Batch, Float32, Int32, PRNGKey
from megalodon_jax.update_guard import Verdict, judge, max_abs, record


class StepMetrics(NamedTuple):
    """Metrics of one update; float32 scalars but for the guard's.

    Attributes:
      loss: mean cross-entropy in nats per weighted target.
      z_loss: mean z-loss, multiplied by its weight.
      accuracy: fraction of weighted targets that were the most probable token.
      grad_norm: global norm of the gradient before clipping.
      learning_rate: rate of this update.
      tokens: sum of the target weights.
      max_param: largest absolute value of the parameters after the update; NaN if one is NaN.
      verdict: the guard's decision about this update.
      skipped: number of skipped updates of the run so far.
      skipped_in_row: number of them since the last update that was applied.
      spiked: number of spikes of the run so far.
    """

    loss: Float32[Array, ""]
    z_loss: Float32[Array, ""]
    accuracy: Float32[Array, ""]
    grad_norm: Float32[Array, ""]
    learning_rate: Float32[Array, ""]
    tokens: Float32[Array, ""]
    max_param: Float32[Array, ""]
    verdict: Verdict
    skipped: Int32[Array, ""]
    skipped_in_row: Int32[Array, ""]
    spiked: Int32[Array, ""]


_GPU_OPTIONS = {
    # Merging dots concatenates their operands first, which costs more than it gains.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # Rounding only where the program casts: otherwise float32 gradients with two uses are stored.
    "xla_allow_excess_precision": False,
    # On several devices, one all-gather for a block's weights and one reduce-scatter for gradients
    # along each axis; states of sequence shards, along another one, must not wait for them.
    "xla_gpu_enable_all_gather_combine_by_dim": True,
    "xla_gpu_enable_reduce_scatter_combine_by_dim": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 128 << 20,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 256 << 20,
}
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_train_step(
    graphdef: nnx.GraphDef,
    config: TrainConfig,
    mesh: Mesh | None = None,
    *,
    task: Task | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> TrainStep:
    """Builds the jitted `step(state, batches) -> (state, metrics)`, which donates `state`.

    `batches` has a leading axis of `accumulate_steps` batches, (A, B, L). The objective is

        (sum of weighted token losses + z-losses, over all A batches) / (sum of weights)

    so that accumulation equals one batch of A * B rows. The dropout key is folded from the seed,
    the step and the index of the batch, so that a resumed run equals an uninterrupted one.

    An update that is not finite, and a spike if `on_spike` is "skip", leaves parameters and
    optimizer state as they are; the step counts. The schedule counts applied updates. With an
    optimizer of your own, of which no bound is known, the new parameters themselves are checked,
    and the learning rate is that of `optax.inject_hyperparams`, or NaN.

    Args:
      graphdef: the model's static structure.
      config: the run.
      mesh: devices; None: those of `config.mesh`.
      task: the loss; None: that of `config.task`.
      optimizer: an optimizer instead of that of `config.optim`; its updates may have any dtype.
    """
    mesh = resolve_mesh(config, mesh)
    shardings = state_shardings(config, mesh, optimizer=optimizer)
    used = optimizer_of(config, optimizer)
    schedule = learning_rate_schedule(config.optim, total_steps=config.steps)
    sums_and_gradient = _make_sums_and_gradient(graphdef, config, task or find_task(config.task))
    on_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm")

    def step(state: TrainState, batches: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            sums, gradient = sums_and_gradient(state.params, state.base, batches, key)
        gradient = jax.lax.with_sharding_constraint(gradient, shardings.params)
        if on_gpu and mesh.size > 1:
            gradient = jax.tree.map(_row_major, gradient)
        # A batch of padding has weight 0: its zero gradient must not become NaN.
        weight = jnp.maximum(sums.weight_sum, 1.0)
        gradient = jax.tree.map(lambda leaf: leaf / weight, gradient)
        updates, opt_state = used.update(gradient, state.opt_state, state.params)
        new_params = apply_updates(state.params, updates)
        metrics = {
            "loss": sums.loss_sum / weight,
            "grad_norm": jnp.asarray(optax.tree.norm(gradient)),
        }
        # The optimizer's own count, which skipped updates do not advance.
        if optimizer is None:
            learning_rate, unbounded = schedule(state.step - state.guard.skipped), None
        else:
            learning_rate, unbounded = _injected_learning_rate(opt_state), new_params
        verdict = judge(
            state.guard, config, learning_rate=learning_rate, new_params=unbounded, **metrics
        )
        # Selections are fused into the update; a `lax.cond` on a GPU waits for the host.
        average = state.average
        if average is not None:
            count = state.step - state.guard.skipped
            average = update_average(average, new_params, decay=config.optim.ema_decay, count=count)
        params, opt_state, average = jax.tree.map(
            lambda new, old: jnp.where(verdict.is_skipped, old, new),
            (new_params, opt_state, average),
            (state.params, state.opt_state, state.average),
        )
        max_param = max_abs(params)
        guard = record(state.guard, config, verdict, max_param=max_param, **metrics)
        new_state = TrainState(state.step + 1, params, opt_state, guard, average, state.base)
        return new_state, StepMetrics(
            **metrics,
            z_loss=sums.z_loss_sum / weight,
            accuracy=sums.correct_sum / weight,
            learning_rate=learning_rate,
            tokens=sums.weight_sum,
            max_param=max_param,
            verdict=verdict,
            skipped=guard.skipped,
            skipped_in_row=guard.skipped_in_row,
            spiked=guard.spiked,
        )

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh, leading=1)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        compiler_options=_GPU_OPTIONS if on_gpu else None,
    )


def _injected_learning_rate(opt_state: optax.OptState) -> Float32[Array, ""]:
    found = optax.tree.get_all_with_path(opt_state, "learning_rate")
    return jnp.asarray(found[0][1] if found else jnp.nan, jnp.float32)


def _row_major(gradient: Array) -> Array:
    """The gradient in its parameter's memory layout.

    A reduce-scatter along columns returns a transposed layout. Without the constraint the optimizer
    adopts it, and three copies transpose the parameter and its moments back.
    """
    return with_layout_constraint(gradient, Layout(tuple(range(gradient.ndim))))


def make_eval_step(
    graphdef: nnx.GraphDef,
    config: TrainConfig,
    mesh: Mesh | None = None,
    *,
    task: Task | None = None,
) -> EvalStep:
    """Builds the jitted `evaluate(params, batch) -> LossOutput`: sums over a batch, no dropout.

    The arguments are those of `make_train_step`.
    """
    mesh, evaluated = resolve_mesh(config, mesh), task or find_task(config.task)

    def evaluate(params: nnx.State, batch: Batch) -> LossOutput:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return evaluated.loss(nnx.merge(graphdef, params), batch, config=config)

    return jax.jit(
        evaluate,
        in_shardings=(state_shardings(config, mesh).evaluated_params, batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def _make_sums_and_gradient(
    graphdef: nnx.GraphDef, config: TrainConfig, task: Task
) -> Callable[[nnx.State, nnx.State | None, Batch, PRNGKey], tuple[LossOutput, nnx.State]]:
    has_dropout = config.model.has_dropout or bool(config.lora.rank and config.lora.dropout)

    def objective(
        params: nnx.State, base: nnx.State | None, batch: Batch, key: PRNGKey | None
    ) -> tuple[Float32[Array, ""], LossOutput]:
        params = join_params(stop_frozen_gradients(params, config.optim), base)
        sums = task.loss(nnx.merge(graphdef, params), batch, config=config, dropout_key=key)
        return sums.loss_sum + sums.z_loss_sum, sums

    gradient_of = jax.grad(objective, has_aux=True)

    def of_batch(
        params: nnx.State, base: nnx.State | None, batch: Batch, index: Array | int, key: PRNGKey
    ):
        gradient, sums = gradient_of(
            params, base, batch, jax.random.fold_in(key, index) if has_dropout else None
        )
        return sums, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)

    def accumulate(
        params: nnx.State, base: nnx.State | None, batches: Batch, key: PRNGKey
    ) -> tuple[LossOutput, nnx.State]:
        if batches.tokens.shape[0] == 1:
            return of_batch(params, base, jax.tree.map(lambda array: array[0], batches), 0, key)

        def add(total, entry):
            index, batch = entry
            return jax.tree.map(jnp.add, total, of_batch(params, base, batch, index, key)), None

        first = jax.tree.map(lambda array: array[0], batches)
        shapes = jax.eval_shape(of_batch, params, base, first, 0, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        indices = jnp.arange(batches.tokens.shape[0])
        return jax.lax.scan(add, zeros, (indices, batches))[0]

    return accumulate
