"""The optimizer and its schedules against AdamW in numpy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megalodon_jax.config import OptimConfig
from megalodon_jax.optimizer import apply_updates, learning_rate_schedule, make_optimizer

TOTAL = 20


def released_factor(config: OptimConfig, step: int) -> float:
    warmup, end = config.warmup_steps, config.end_ratio
    if step < warmup:
        return config.init_ratio + step * (1.0 - config.init_ratio) / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        decayed = max(0, min(step, TOTAL) - (TOTAL - config.decay_steps)) / config.decay_steps
        return 1 - (1 - end) * math.sqrt(decayed)
    if step > TOTAL:
        return end
    s = (step - warmup) / (TOTAL - warmup)
    if config.schedule == "linear":
        return s * end + (1 - s)
    return end + 0.5 * (1 - end) * (math.cos(math.pi * s) + 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedule_equals_its_definition(schedule, warmup):
    config = OptimConfig(
        lr=3e-3, schedule=schedule, warmup_steps=warmup, init_ratio=0.01, end_ratio=0.1,
        decay_steps=9 if schedule == "wsd" else 0,
    )  # fmt: skip
    rate = learning_rate_schedule(config, total_steps=TOTAL)
    for step in range(TOTAL + 5):
        expected = config.lr * released_factor(config, step)
        np.testing.assert_allclose(float(rate(step)), expected, rtol=2e-6)


def test_warmup_longer_than_the_run_never_reaches_the_decay():
    rate = learning_rate_schedule(OptimConfig(warmup_steps=50), total_steps=TOTAL)
    values = [float(rate(step)) for step in range(TOTAL)]
    assert values == sorted(values)
    assert all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_updates_equal_numpy_adamw(clip_norm):
    config = OptimConfig(
        lr=0.02, warmup_steps=3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3,
        clip_norm=clip_norm,
    )  # fmt: skip
    random = np.random.default_rng(0)
    # A vector and a matrix: the released optimizer decays both.
    expected = {"bias": random.normal(size=3), "kernel": random.normal(size=(3, 4))}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in expected.items()}
    optimizer = make_optimizer(config, total_steps=TOTAL)
    state = optimizer.init(params)
    m = {name: np.zeros_like(value) for name, value in expected.items()}
    v = {name: np.zeros_like(value) for name, value in expected.items()}
    for step in range(6):
        gradient = {name: random.normal(size=value.shape) for name, value in expected.items()}
        rounded = {name: jnp.asarray(g, jnp.float32) for name, g in gradient.items()}
        updates, state = optimizer.update(rounded, state, params)
        params = apply_updates(params, updates)

        norm = math.sqrt(sum(float(np.sum(g**2)) for g in gradient.values()))
        scale = clip_norm / norm if clip_norm and norm > clip_norm else 1.0
        rate = config.lr * released_factor(config, step)
        for name, value in expected.items():
            g = gradient[name] * scale
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g**2
            m_hat = m[name] / (1 - config.beta1 ** (step + 1))
            v_hat = v[name] / (1 - config.beta2 ** (step + 1))
            decayed = value * (1 - rate * config.weight_decay)
            expected[name] = decayed - rate * m_hat / (np.sqrt(v_hat) + config.eps)
        for name, value in expected.items():
            np.testing.assert_allclose(params[name], value, rtol=2e-5, atol=1e-6)


def test_moments_of_bfloat16_parameters_are_float32():
    optimizer = make_optimizer(OptimConfig(warmup_steps=0), total_steps=TOTAL)
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    state = optimizer.init(params)
    updates, state = optimizer.update({"w": jnp.full(4, 1e-3, jnp.bfloat16)}, state, params)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) == 2
    assert all(leaf.dtype == jnp.float32 for leaf in floats)
    assert jax.tree.leaves(updates)[0].dtype == jnp.float32
    assert apply_updates(params, updates)["w"].dtype == jnp.bfloat16
