"""AdamW and its learning-rate schedule, as in the released code; Muon; averages of parameters."""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from megalodon_jax.config import OptimConfig
from megalodon_jax.parameter_names import check_patterns, is_selected, map_names, map_selected
from megalodon_jax.typing import Array, Float32, Int32

# Patterns of the parameters that Muon updates.
MUON_PARAMS = ("layers.*.kernel",)
_MUON_RMS = 0.2

Schedule = Callable[[Any], Float32[Array, ""]]


class ScheduleValues(NamedTuple):
    """The numbers of a learning-rate schedule, float32.

    A compiled step takes them as an argument: runs that differ in them share its program.

    Attributes:
      lr: peak rate.
      init_ratio: first rate over the peak rate.
      init_rest: 1 - `init_ratio`.
      warmup: steps of the warm-up.
      warmup_length: `warmup`, at least 1.
      total: steps of the run.
      decay_length: `total` - `warmup`, at least 1.
      end_ratio: last rate over the peak rate.
      end_rest: 1 - `end_ratio`.
      wsd_length: steps of the decay of "wsd".
    """

    lr: Any
    init_ratio: Any
    init_rest: Any
    warmup: Any
    warmup_length: Any
    total: Any
    decay_length: Any
    end_ratio: Any
    end_rest: Any
    wsd_length: Any


def schedule_values(config: OptimConfig, *, total_steps: int) -> ScheduleValues:
    """The numbers of the schedule of a run of `total_steps` updates."""
    warmup = config.warmup_steps
    values = (
        config.lr, config.init_ratio, 1.0 - config.init_ratio, warmup, max(warmup, 1),
        total_steps, max(total_steps - warmup, 1), config.end_ratio, 1.0 - config.end_ratio,
        config.decay_steps,
    )  # fmt: skip
    return ScheduleValues(*(np.float32(value) for value in values))


def learning_rate_schedule(
    config: OptimConfig, *, total_steps: int, values: ScheduleValues | None = None
) -> Schedule:
    """Learning rate of update `step` (0, 1, ...), as released.

    With r = `init_ratio`, e = `end_ratio`, w = `warmup_steps`, s = (step - w) / (total_steps - w):

        step < w      lr * (r + step * (1 - r) / w)
        linear        lr * (s * e + 1 - s)
        cosine        lr * (e + (1 - e) * (cos(pi * s) + 1) / 2)
        constant      lr
        wsd           lr * (1 - (1 - e) * sqrt(u)), u = max(0, (step - total_steps) / d + 1)

    The last one (warmup, stable, decay; Hägele et al. 2024, arXiv 2405.18392) has d =
    `decay_steps`. After `total_steps` the decaying schedules stay at lr * e.

    Args:
      config: peak rate, shape and ratios.
      total_steps: number of updates of the run.
      values: the numbers, for a compiled step; None: `schedule_values` of the others.

    Returns:
      A function from the step (int32 scalar) to the rate (float32 scalar).
    """
    v = schedule_values(config, total_steps=total_steps) if values is None else values

    def schedule(step: Any) -> Float32[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        warmup_factor = v.init_ratio + step * v.init_rest / v.warmup_length
        progress = jnp.clip((step - v.warmup) / v.decay_length, 0.0, 1.0)
        if config.schedule == "linear":
            decay_factor = progress * v.end_ratio + (1.0 - progress)
        elif config.schedule == "cosine":
            decay_factor = v.end_ratio + 0.5 * v.end_rest * (jnp.cos(jnp.pi * progress) + 1.0)
        elif config.schedule == "wsd":
            decayed = jnp.clip((step - v.total) / v.wsd_length + 1.0, 0.0, 1.0)
            decay_factor = 1.0 - v.end_rest * jnp.sqrt(decayed)
        else:
            decay_factor = jnp.ones_like(step)
        return v.lr * jnp.where(step < v.warmup, warmup_factor, decay_factor)

    return schedule


def make_optimizer(
    config: OptimConfig, *, total_steps: int, values: ScheduleValues | None = None
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with weight decay of every parameter, as released.

    With the clipped gradient g and the scheduled rate lr of this update:

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        change = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * parameter
        parameter -= lr * change

    With `name = "muon"` the matrices of the layers (`layers.*.kernel`) take Muon's update instead
    of the first summand: the Nesterov momentum of g, orthogonalized by Newton-Schulz iterations and
    multiplied by 0.2 sqrt(max(rows, columns)), which gives it the root mean square of AdamW's (Liu
    et al. 2025, arXiv 2502.16982).

    `frozen` parameters have no state and never change; `no_weight_decay` ones have no decay; lr of
    the `scaled_lr` ones is multiplied by `lr_scale`, for the decay too.
    Moments and arithmetic are float32 for every parameter dtype; the returned updates are float32,
    for `apply_updates`.

    Args:
      config: rates, betas, decay and clipping.
      total_steps: number of updates of the run, for the schedule.
      values: of the schedule, see `learning_rate_schedule`.

    Raises:
      ConfigError: from `init`, if a pattern matches no parameter.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    schedule = learning_rate_schedule(config, total_steps=total_steps, values=values)
    inner = optax.chain(clip, _unclipped(config, schedule))

    def init(params: optax.Params) -> optax.OptState:
        for setting in ("no_weight_decay", "scaled_lr", "frozen"):
            check_patterns(params, getattr(config, setting), setting=f"optim.{setting}")
        return inner.init(_as_float32(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("weight decay needs the parameters; call update(grads, state, params)")
        changes, new_state = inner.update(_as_float32(updates), state, _as_float32(params))
        return _scale_selected(changes, config), new_state

    return optax.GradientTransformation(init, update)


def _unclipped(config: OptimConfig, schedule: Schedule) -> optax.GradientTransformation:
    def is_decayed(params: optax.Params) -> Any:
        return map_names(lambda name: not is_selected(name, config.no_weight_decay), params)

    mask = is_decayed if config.no_weight_decay else None
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=mask,
    )
    if config.name == "adamw" and not config.frozen:
        return adamw

    def group(name: str) -> str:
        if is_selected(name, config.frozen):
            return "frozen"
        return "muon" if config.name == "muon" and is_selected(name, MUON_PARAMS) else "adamw"

    transforms: dict[Hashable, Any] = {"adamw": adamw, "frozen": optax.set_to_zero()}
    if config.name == "muon":
        transforms["muon"] = optax.chain(
            optax.contrib.scale_by_muon(
                beta=config.muon_momentum, weight_dimension_numbers=_stacked_matrices
            ),
            optax.stateless_with_tree_map(lambda update, _: _scale_to_rms(jnp.asarray(update))),
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.scale_by_learning_rate(schedule),
        )
    return optax.partition(transforms, lambda params: map_names(group, params))


def _scale_selected(updates: optax.Updates, config: OptimConfig) -> optax.Updates:
    """Updates at the parameters' own rates; without a state, so that a resumed run may differ."""
    if config.lr_scale == 1.0:
        return updates
    return map_selected(lambda update: update * config.lr_scale, updates, config.scaled_lr)


def _scale_to_rms(update: Array) -> Array:
    """An orthogonal matrix (..., in, out) with the root mean square `_MUON_RMS`."""
    return update * (_MUON_RMS * math.sqrt(max(update.shape[-2:])))


def _stacked_matrices(params: optax.Params) -> Any:
    """Kernels (..., in, out) are batches of matrices."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return map_names(lambda _: matrix, params)


def stop_frozen_gradients[T](params: T, config: OptimConfig) -> T:
    """The parameters; no gradient of frozen ones is computed."""
    if not config.frozen:
        return params
    return map_selected(jax.lax.stop_gradient, params, config.frozen)


def first_moments(opt_state: optax.OptState) -> Any:
    """Every first moment (`mu`) of an optimizer's state."""
    return [moment for _, moment in optax.tree.get_all_with_path(opt_state, "mu")]


def update_average[T](average: T, params: T, *, decay: float, count: Int32[Array, ""]) -> T:
    """The exponential moving average of the parameters after an update.

    With d = min(decay, (1 + t) / (10 + t)) after t updates, so that the first values fade soon:

        average = d * average + (1 - d) * parameter

    Args:
      average: float32.
      params: the new parameters, of any dtype.
      decay: the largest rate.
      count: t, the number of updates before this one.
    """
    t = count.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + t) / (10 + t))
    return jax.tree.map(
        lambda old, new: old + (1 - d) * (new.astype(old.dtype) - old), average, params
    )


def apply_updates[T](params: T, updates: Any) -> T:
    """Adds float32 updates in float32 and casts once to each parameter's dtype."""
    return jax.tree.map(
        lambda param, change: (param.astype(jnp.float32) + change).astype(param.dtype),
        params,
        updates,
    )


def _as_float32(tree: optax.Params) -> optax.Params:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
