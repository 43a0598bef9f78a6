"""The train step and the evaluation step as pure jitted functions."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.cache import CarriedState
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
from megalodon_jax.training.carried_rows import RowsLoss, make_loss, start_new
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
      input_tokens: input tokens of this update, where they are not the weighted targets (a class of
        a document); None where they are.
      carried: fraction of weighted targets in documents that began in an earlier row, see
        `data.carry_state`; None without.
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
    carried: Float32[Array, ""] | None = None
    input_tokens: Float32[Array, ""] | None = None

    @property
    def processed_tokens(self) -> Float32[Array, ""]:
        """Tokens that went through the model and count for its speed."""
        return self.tokens if self.input_tokens is None else self.input_tokens


_GPU_OPTIONS: dict[str, Any] = {
    # Merging dots concatenates their operands first, which costs more than it gains.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # Products by cuBLAS alone, which adds the terms of a sum to its output; beside Triton's the
    # compiler adds them in a pass of their own.
    "xla_gpu_enable_triton_gemm": False,
    # Rounding only where the program casts: otherwise float32 gradients with two uses are stored.
    "xla_allow_excess_precision": False,
    # On several devices, one all-gather for a block's weights and one reduce-scatter for gradients
    # along each axis; states of sequence shards, along another one, must not wait for them.
    "xla_gpu_enable_all_gather_combine_by_dim": True,
    "xla_gpu_enable_reduce_scatter_combine_by_dim": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 128 << 20,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 256 << 20,
}
# Devices of one process copy to each other by their copy engines, which take no multiprocessors.
_COPY_ENGINE_OPTIONS = {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"}
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

    so that accumulation equals one batch of A * B rows. With `data.carry_state` batch a + 1 of a
    step continues the rows of batch a, and the first batch those of the step before. The dropout
    key is folded from the seed, the step and the index of the batch, so that a resumed run equals
    an uninterrupted one.

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
    sums_and_gradient = _make_sums_and_gradient(graphdef, config, task or find_task(config.task))
    compiler_options = _compiler_options(mesh)

    def step(state: TrainState, batches: Batch) -> tuple[TrainState, StepMetrics]:
        if state.values is None:
            raise ValueError("the state has no values; take that of init_state or of a checkpoint")
        key = jax.random.fold_in(jax.random.key(state.values.seed), state.step)
        used = optimizer_of(config, optimizer, state.values)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (sums, num_carried, carried), gradient = sums_and_gradient(
                state.params, state.base, batches, state.carried, key
            )
        gradient = jax.lax.with_sharding_constraint(gradient, shardings.params)
        if compiler_options and mesh.size > 1:
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
            schedule = learning_rate_schedule(
                config.optim, total_steps=config.steps, values=state.values.schedule
            )
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
        if carried is not None:
            # The state follows the rows, whether or not the update is applied. What a loss that is
            # not finite leaves in it is not used: documents that go on begin anew.
            carried = start_new(carried, ~jnp.isfinite(metrics["loss"]))
        new_state = TrainState(
            state.step + 1, params, opt_state, guard, average, carried, state.base, state.values
        )
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
            carried=None if num_carried is None else num_carried / weight,
            input_tokens=sums.num_tokens,
        )

    jit = partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        compiler_options=compiler_options,
    )
    rows = batch_sharding(mesh, leading=1)
    if shardings.carried is None:
        return jit(step, in_shardings=(shardings, rows))

    def step_from(state: TrainState, carried: CarriedState, batches: Batch):
        return step(state._replace(carried=carried), batches)

    others = shardings._replace(carried=None)
    return _StepWithState(jit(step_from, in_shardings=(others, shardings.carried, rows)))


def _compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """XLA's options for a step over these devices; None: its defaults."""
    devices = mesh.devices.flat
    if devices[0].platform not in ("gpu", "cuda", "rocm"):
        return None
    # Measured for the exchanges of tensor parallelism alone.
    if mesh.shape["model"] > 1 and len({each.process_index for each in devices}) == 1:
        return _GPU_OPTIONS | _COPY_ENGINE_OPTIONS
    return _GPU_OPTIONS


class _StepWithState:
    """A jitted step that donates everything but the state of the rows.

    The backward pass reads the old state after the forward pass has written the new one: in one
    buffer, the new one would be written elsewhere and copied at the end of the step.
    """

    def __init__(self, jitted: Any) -> None:
        self._jitted = jitted

    def __call__(self, state: TrainState, batches: Batch) -> tuple[TrainState, StepMetrics]:
        return self._jitted(state._replace(carried=None), state.carried, batches)

    def lower(self, state: TrainState, batches: Batch) -> jax.stages.Lowered:
        return self._jitted.lower(state._replace(carried=None), state.carried, batches)


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


class _SumsAndGradient(Protocol):
    def __call__(
        self,
        params: nnx.State,
        base: nnx.State | None,
        batches: Batch,
        state: CarriedState | None,
        key: PRNGKey,
    ) -> tuple[RowsLoss, nnx.State]: ...


def _make_sums_and_gradient(
    graphdef: nnx.GraphDef, config: TrainConfig, task: Task
) -> _SumsAndGradient:
    has_dropout = config.model.has_dropout or bool(config.lora.rank and config.lora.dropout)
    # Masks of masked language modeling are drawn with the key too.
    has_dropout = has_dropout or getattr(task, "needs_key", False)
    loss = make_loss(task, config)

    def objective(
        params: nnx.State,
        base: nnx.State | None,
        batch: Batch,
        state: CarriedState | None,
        key: PRNGKey | None,
    ) -> tuple[Float32[Array, ""], RowsLoss]:
        params = join_params(stop_frozen_gradients(params, config.optim), base)
        out = loss(nnx.merge(graphdef, params), batch, state, key)
        return out.sums.loss_sum + out.sums.z_loss_sum, out

    gradient_of = jax.grad(objective, has_aux=True)

    def of_batch(params: nnx.State, base, batch: Batch, state, index: Array | int, key: PRNGKey):
        gradient, out = gradient_of(
            params, base, batch, state, jax.random.fold_in(key, index) if has_dropout else None
        )
        return out, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)

    def accumulate(params, base, batches, state, key) -> tuple[RowsLoss, nnx.State]:
        first = jax.tree.map(lambda array: array[0], batches)
        if batches.tokens.shape[0] == 1:
            return of_batch(params, base, first, state, 0, key)

        def add(total, entry):
            (out, gradient), state = total
            index, batch = entry
            new, new_gradient = of_batch(params, base, batch, state, index, key)
            added = jax.tree.map(jnp.add, (out, gradient), (new._replace(state=None), new_gradient))
            return (added, new.state), None

        out, gradient = jax.eval_shape(of_batch, params, base, first, state, 0, key)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (out._replace(state=None), gradient)
        )
        indices = jnp.arange(batches.tokens.shape[0])
        (total, state), _ = jax.lax.scan(add, (zeros, state), (indices, batches))
        return total[0]._replace(state=state), total[1]

    return accumulate
