"""The guard of updates: what is skipped, what counts as a spike, and that nothing else changes."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megalodon_jax.config import OptimConfig, TrainConfig
from megalodon_jax.train_state import TrainState, init_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch
from megalodon_jax.update_guard import GuardState, Verdict, init_guard, judge, record

WINDOW = 5


@pytest.fixture(scope="module")
def guarded(session_config) -> TrainConfig:
    return dataclasses.replace(
        session_config,
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        spike_window=WINDOW,
        spike_threshold=4.0,
        on_spike="skip",
    )


@pytest.fixture(scope="module")
def step_and_state(guarded):
    graphdef, state = init_state(guarded)
    return make_train_step(graphdef, guarded), state


def copy_of(state: TrainState) -> TrainState:
    """A copy, because the step donates its state."""
    return jax.tree.map(jnp.copy, state)


def random_batch(seed: int, *, weight: float = 1.0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 257, (1, 2, 17)).astype(np.int32)
    weights = np.full((1, 2, 16), weight, np.float32)
    return Batch(tokens[..., :-1], tokens[..., 1:], np.ones((1, 2, 16), np.int32), weights)  # type: ignore[arg-type]


def with_window(state: TrainState, loss: float, grad_norm: float) -> TrainState:
    """The state after a full window of nearly equal steps."""
    noise = jnp.linspace(0.9, 1.1, WINDOW)
    guard = state.guard._replace(
        losses=loss * noise, grad_norms=grad_norm * noise, count=jnp.asarray(WINDOW, jnp.int32)
    )
    return copy_of(state._replace(guard=guard))


@pytest.mark.slow
def test_an_update_that_is_not_finite_changes_nothing_but_the_counts(step_and_state):
    step, state = step_and_state
    skipped, metrics = step(copy_of(state), random_batch(0, weight=np.inf))
    assert not np.isfinite(metrics.loss)
    assert bool(metrics.verdict.is_skipped)
    assert (int(skipped.step), int(metrics.skipped), int(metrics.skipped_in_row)) == (1, 1, 1)
    chex.assert_trees_all_equal(
        (skipped.params, skipped.opt_state), (state.params, state.opt_state)
    )
    # The next update equals that of a run without the bad batch, the learning rate included.
    after, metrics = step(skipped, random_batch(1))
    expected, expected_metrics = step(copy_of(state), random_batch(1))
    chex.assert_trees_all_equal(
        (after.params, after.opt_state), (expected.params, expected.opt_state)
    )
    assert float(metrics.learning_rate) == float(expected_metrics.learning_rate)
    assert (int(metrics.skipped), int(metrics.skipped_in_row)) == (1, 0)
    assert (int(after.step), int(expected.step)) == (2, 1)


@pytest.mark.parametrize(("loss", "grad_norm", "is_spike"), [(2, 1e3, True), (1e3, 1e3, False)])
def test_a_spike_is_skipped(step_and_state, loss, grad_norm, is_spike):
    """The loss of the untrained model is ln 257."""
    step, state = step_and_state
    after, metrics = step(with_window(state, loss, grad_norm), random_batch(0))
    assert bool(metrics.verdict.is_spike) == bool(metrics.verdict.is_skipped) == is_spike
    assert int(after.guard.spiked) == int(after.guard.skipped) == int(is_spike)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after.params, state.params)
    assert any(jax.tree.leaves(moved)) is not is_spike
    # It enters the window in the place of the oldest one: a lasting change is no spike for long.
    assert float(after.guard.losses[0]) == float(metrics.loss)


def guard_of(config: TrainConfig, **values: float) -> GuardState:
    guard = init_guard(config, {"w": jnp.ones(2)}, {"w": jnp.zeros(2)})  # type: ignore[arg-type]
    return guard._replace(**{name: jnp.asarray(value) for name, value in values.items()})


def verdicts(config: TrainConfig, losses: np.ndarray, norms: np.ndarray) -> list[Verdict]:
    @jax.jit
    def one(guard: GuardState, loss: Any, norm: Any):
        values = {"loss": loss, "grad_norm": norm}
        verdict = judge(guard, config, learning_rate=jnp.asarray(1e-3), **values)
        return verdict, record(guard, config, verdict, max_param=guard.max_param, **values)

    guard, found = guard_of(config), []
    for loss, norm in zip(losses, norms, strict=True):
        verdict, guard = one(guard, jnp.float32(loss), jnp.float32(norm))
        found.append(jax.device_get(verdict))
    return found


@pytest.mark.parametrize("on_spike", ["warn", "skip"])
def test_spikes_equal_their_definition_in_numpy(guarded, on_spike):
    config = dataclasses.replace(guarded, on_spike=on_spike)
    random = np.random.default_rng(0)
    losses = random.gamma(4.0, 1.0, 200).astype(np.float32)
    norms = random.gamma(4.0, 1.0, 200).astype(np.float32)
    losses[50], norms[90], losses[120] = np.nan, np.inf, 1e3
    window: list[tuple[float, float]] = []
    expected = []
    for loss, norm in zip(losses.astype(np.float64), norms.astype(np.float64), strict=True):
        is_finite = bool(np.isfinite(loss) and np.isfinite(norm))
        is_spike = False
        if is_finite and len(window) == WINDOW:
            for newest, values in zip((loss, norm), np.transpose(window), strict=True):
                median = np.median(values)
                deviation = 1.4826 * np.median(np.abs(values - median))
                is_spike |= bool(newest > median + 4.0 * max(deviation, 0.01 * abs(median)))
        if is_finite:
            window = [*window, (loss, norm)][-WINDOW:]
        expected.append((is_finite, is_spike, not is_finite or (is_spike and on_spike == "skip")))
    assert [tuple(map(bool, verdict)) for verdict in verdicts(config, losses, norms)] == expected
    assert 5 < sum(is_spike for _, is_spike, _ in expected) < 100


def test_the_first_window_has_no_spike(guarded):
    found = verdicts(guarded, np.array([1, 1, 1, 1, 1e6, 1e6]), np.ones(6))
    assert [bool(verdict.is_spike) for verdict in found] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("lr", "values"),
    [
        # Adam's change may reach max_gradient / ((1 - beta1) eps) = 1e9 per unit of lr.
        (1e30, {}),
        # Weight decay alone overflows.
        (1e3, {"max_param": 1e37}),
        (1e-3, {"max_param": 3e38}),
        (1e-3, {"max_param": np.nan}),
        (1e25, {"max_gradient": 1e9}),
    ],
)
def test_updates_that_may_overflow_are_skipped(guarded, lr, values):
    loss = grad_norm = jnp.float32(1.0)

    def is_finite(lr: float, **values: float) -> bool:
        verdict = judge(
            guard_of(guarded, **values), guarded,
            loss=loss, grad_norm=grad_norm, learning_rate=jnp.float32(lr),
        )  # fmt: skip
        return bool(verdict.is_finite)

    assert is_finite(1.0)
    assert not is_finite(lr, **values)


def test_a_larger_rate_of_some_parameters_is_in_the_bound(guarded):
    def is_finite(config: TrainConfig) -> bool:
        verdict = judge(
            guard_of(config), config, loss=jnp.float32(1), grad_norm=jnp.float32(1),
            learning_rate=jnp.float32(1e27),
        )  # fmt: skip
        return bool(verdict.is_finite)

    optim = dataclasses.replace(guarded.optim, scaled_lr=("*.cema.*",), lr_scale=1000.0)
    assert is_finite(guarded)
    assert not is_finite(dataclasses.replace(guarded, optim=optim))


@pytest.mark.slow
def test_a_huge_learning_rate_leaves_the_weights_alone(guarded, step_and_state):
    huge = dataclasses.replace(guarded, optim=OptimConfig(lr=1e37, warmup_steps=0))
    graphdef, state = init_state(huge)
    after, metrics = make_train_step(graphdef, huge)(copy_of(state), random_batch(0))
    assert np.isfinite(metrics.loss)
    assert np.isfinite(metrics.grad_norm)
    assert bool(metrics.verdict.is_skipped)
    chex.assert_trees_all_equal(after.params, step_and_state[1].params)


def test_the_largest_parameter_is_that_after_the_update(step_and_state):
    step, state = step_and_state
    after, metrics = step(copy_of(state), random_batch(0))
    largest = max(
        float(np.abs(leaf).max()) for leaf in map(np.asarray, jax.tree.leaves(after.params))
    )
    assert float(metrics.max_param) == float(after.guard.max_param) == np.float32(largest)
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), copy_of(state).params)
    _, metrics = step(copy_of(state)._replace(params=broken), random_batch(0))
    assert np.isnan(metrics.max_param)
