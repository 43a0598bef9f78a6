"""AdamW and its learning-rate schedule, as in the released code."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from megalodon_jax.config import OptimConfig
from megalodon_jax.typing import Array, Float32

Schedule = Callable[[Any], Float32[Array, ""]]


def learning_rate_schedule(config: OptimConfig, *, total_steps: int) -> Schedule:
    """Learning rate of update `step` (0, 1, ...), as released.

    With r = `init_ratio`, e = `end_ratio`, w = `warmup_steps`, s = (step - w) / (total_steps - w):

        step < w      lr * (r + step * (1 - r) / w)
        linear        lr * (s * e + 1 - s)
        cosine        lr * (e + (1 - e) * (cos(pi * s) + 1) / 2)
        constant      lr

    After `total_steps` the decaying schedules stay at lr * e.

    Args:
      config: peak rate, shape and ratios.
      total_steps: number of updates of the run.

    Returns:
      A function from the step (int32 scalar) to the rate (float32 scalar).
    """

    def schedule(step: Any) -> Float32[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        warmup, end = config.warmup_steps, config.end_ratio
        warmup_factor = config.init_ratio + step * (1.0 - config.init_ratio) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        if config.schedule == "linear":
            decay_factor = progress * end + (1.0 - progress)
        elif config.schedule == "cosine":
            decay_factor = end + 0.5 * (1.0 - end) * (jnp.cos(jnp.pi * progress) + 1.0)
        else:
            decay_factor = jnp.ones_like(step)
        return config.lr * jnp.where(step < warmup, warmup_factor, decay_factor)

    return schedule


def make_optimizer(config: OptimConfig, *, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with weight decay of every parameter, as released.

    With the clipped gradient g and the scheduled rate lr of this update:

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        change = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * parameter
        parameter -= lr * change

    Moments and arithmetic are float32 for every parameter dtype; the returned updates are float32,
    for `apply_updates`.

    Args:
      config: rates, betas, decay and clipping.
      total_steps: number of updates of the run, for the schedule.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate_schedule(config, total_steps=total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    inner = optax.chain(clip, adamw)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(_as_float32(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("weight decay needs the parameters; call update(grads, state, params)")
        return inner.update(_as_float32(updates), state, _as_float32(params))

    return optax.GradientTransformation(init, update)


def apply_updates[T](params: T, updates: Any) -> T:
    """Adds float32 updates in float32 and casts once to each parameter's dtype."""
    return jax.tree.map(
        lambda param, change: (param.astype(jnp.float32) + change).astype(param.dtype),
        params,
        updates,
    )


def _as_float32(tree: optax.Params) -> optax.Params:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
