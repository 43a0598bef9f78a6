"""The guard of an update: skips what is not finite, detects spikes; its state stays on the device.

Every decision is taken inside the train step from scalars that it has anyway, so that nothing waits
for the host and a resumed run takes the same decisions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from megalodon_jax.config import TrainConfig
from megalodon_jax.typing import Array, Bool, Float32, Int32

# Normal noise has a standard deviation of 1.4826 median absolute deviations.
_NORMAL_DEVIATION = 1.4826
# A window of nearly equal values (padding, a memorized text) has no deviation: 1 % of the median.
_SMALLEST_DEVIATION = 0.01
# Rounding is far below the factor between this fraction of a dtype's range and the range.
_SAFE_FRACTION = 0.25
# Entries of an orthogonalized matrix are at most its largest singular value, below 2 after the
# Newton-Schulz iterations; the factor 0.2 sqrt(width) is below 200 for widths up to 10^6.
_LARGEST_MUON_UPDATE = 400.0


class GuardState(NamedTuple):
    """The state of the guard between updates.

    Attributes:
      losses: the last W = `spike_window` finite losses, a ring buffer.
      grad_norms: their gradient norms.
      count: number of updates that entered the window.
      max_gradient: bound of the first moment's largest absolute value.
      max_param: the largest absolute value of the parameters; NaN if one of them is NaN.
      skipped: number of skipped updates of the run.
      skipped_in_row: number of skipped updates since the last one that was applied.
      spiked: number of spikes of the run.
    """

    losses: Float32[Array, " W"]
    grad_norms: Float32[Array, " W"]
    count: Int32[Array, ""]
    max_gradient: Float32[Array, ""]
    max_param: Float32[Array, ""]
    skipped: Int32[Array, ""]
    skipped_in_row: Int32[Array, ""]
    spiked: Int32[Array, ""]


class Verdict(NamedTuple):
    """The guard's decision about one update.

    Attributes:
      is_finite: loss and gradient norm are finite, and the new parameters are bound to be.
      is_spike: loss or gradient norm is far above those of the window.
      is_skipped: parameters and optimizer state remain as they were.
    """

    is_finite: Bool[Array, ""]
    is_spike: Bool[Array, ""]
    is_skipped: Bool[Array, ""]


def init_guard(config: TrainConfig, params: nnx.State, first_moments: Any) -> GuardState:
    """The state of a run that starts from these parameters: an empty window, no counts.

    Args:
      config: the run.
      params: the parameters.
      first_moments: the optimizer's first moments, zero unless the run is resumed.
    """
    zero = jnp.zeros((), jnp.int32)
    return GuardState(
        losses=jnp.zeros(config.spike_window, jnp.float32),
        grad_norms=jnp.zeros(config.spike_window, jnp.float32),
        count=zero,
        max_gradient=max_abs(first_moments),
        max_param=max_abs(params),
        skipped=zero,
        skipped_in_row=zero,
        spiked=zero,
    )


def max_abs(tree: Any) -> Float32[Array, ""]:
    """The largest absolute value of all leaves, 0 without any; NaN if one is NaN."""
    largest = [jnp.max(jnp.abs(leaf)).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(largest)) if largest else jnp.zeros((), jnp.float32)


def judge(
    guard: GuardState,
    config: TrainConfig,
    *,
    loss: Float32[Array, ""],
    grad_norm: Float32[Array, ""],
    learning_rate: Float32[Array, ""],
    new_params: nnx.State | None = None,
) -> Verdict:
    """Decides about an update before it is applied.

    With m and p the largest absolute first moment and parameter, and AdamW's settings:

        abs(new parameter) <= p + lr max(1, lr_scale) (m / ((1 - beta1) eps) + weight_decay p)

    bounds every intermediate result too; Muon's update has a constant bound. A finite gradient norm
    makes the second moment finite, so that a bound inside the range of the parameters' dtype proves
    that the new parameters are finite. Reductions over the update itself would read parameters and
    moments twice.

    Of an optimizer without such a bound, the new parameters are checked instead.

    Args:
      guard: the state before the update.
      config: the run.
      loss: of this update's batch.
      grad_norm: before clipping.
      learning_rate: of this update; unused with `new_params`.
      new_params: the new parameters of an optimizer that is not that of `config.optim`.
    """
    optim = config.optim
    moment = jnp.maximum(guard.max_gradient, _clipped(config, grad_norm))
    change = moment / ((1.0 - optim.beta1) * optim.eps) + optim.weight_decay * guard.max_param
    if optim.name == "muon":
        change = change + _LARGEST_MUON_UPDATE
    bound = guard.max_param + learning_rate * max(1.0, optim.lr_scale) * change
    limit = _SAFE_FRACTION * float(jnp.finfo(config.model.param_dtype).max)
    # A comparison with NaN is false.
    is_safe = bound < limit if new_params is None else max_abs(new_params) < limit
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & is_safe
    newest = jnp.stack([loss, grad_norm])
    is_spike = is_finite & _is_spike(guard, newest, threshold=config.spike_threshold)
    is_skipped = ~is_finite | is_spike if config.on_spike == "skip" else ~is_finite
    return Verdict(is_finite, is_spike, is_skipped)


def record(
    guard: GuardState,
    config: TrainConfig,
    verdict: Verdict,
    *,
    loss: Float32[Array, ""],
    grad_norm: Float32[Array, ""],
    max_param: Float32[Array, ""],
) -> GuardState:
    """The guard's state after an update; a spike enters the window too, so that it adapts."""
    slot = guard.count % config.spike_window
    is_applied = ~verdict.is_skipped

    def push(values: Array, newest: Array) -> Array:
        return jnp.where(verdict.is_finite, values.at[slot].set(newest), values)

    moment = jnp.maximum(guard.max_gradient, _clipped(config, grad_norm))
    return GuardState(
        losses=push(guard.losses, loss),
        grad_norms=push(guard.grad_norms, grad_norm),
        count=guard.count + verdict.is_finite,
        max_gradient=jnp.where(is_applied, moment, guard.max_gradient),
        max_param=max_param,
        skipped=guard.skipped + verdict.is_skipped,
        skipped_in_row=jnp.where(is_applied, 0, guard.skipped_in_row + 1),
        spiked=guard.spiked + verdict.is_spike,
    )


def _clipped(config: TrainConfig, grad_norm: Float32[Array, ""]) -> Float32[Array, ""]:
    limit = config.optim.clip_norm
    return jnp.minimum(grad_norm, limit) if limit else grad_norm


def _is_spike(
    guard: GuardState, newest: Float32[Array, "2"], *, threshold: float
) -> Bool[Array, ""]:
    """Whether the loss or the gradient norm exceeds median + threshold deviations of a full window.

    The deviation is 1.4826 times the median absolute deviation.
    """
    window = jnp.stack([guard.losses, guard.grad_norms])
    median = jnp.median(window, axis=1)
    deviation = _NORMAL_DEVIATION * jnp.median(jnp.abs(window - median[:, None]), axis=1)
    deviation = jnp.maximum(deviation, _SMALLEST_DEVIATION * jnp.abs(median))
    is_full = guard.count >= guard.losses.shape[0]
    return is_full & jnp.any(newest > median + threshold * deviation)
