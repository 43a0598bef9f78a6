"""Muon, weight decay by pattern, frozen parameters and the average of the parameters."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megalodon_jax.config import OptimConfig, TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.optimizer import apply_updates, make_optimizer, update_average

TOTAL = 20
SHAPES = {"kernel": (2, 3, 5), "weight": (2, 5)}


def random_tree(seed: int) -> dict:
    random = np.random.default_rng(seed)
    layers = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    return {"embed": {"embedding": random.normal(size=(7, 4))}, "layers": {"fc1": layers}}


def float32(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def run(config: OptimConfig, *, steps: int = 4) -> list[dict]:
    """Parameters before every update and after the last."""
    optimizer = make_optimizer(config, total_steps=TOTAL)
    params = [float32(random_tree(0))]
    state = optimizer.init(params[0])
    for step in range(steps):
        updates, state = optimizer.update(float32(random_tree(step + 1)), state, params[-1])
        params.append(apply_updates(params[-1], updates))
    return params


def orthogonalized(matrix: np.ndarray) -> np.ndarray:
    """Five quintic Newton-Schulz iterations with the coefficients of Jordan et al. 2024."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T) / np.linalg.norm(matrix)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


def test_muon_equals_its_definition_in_numpy():
    config = OptimConfig(
        name="muon", lr=0.1, warmup_steps=0, schedule="constant", weight_decay=0.3, clip_norm=0.0,
        muon_momentum=0.9,
    )  # fmt: skip
    found = run(config)
    adamw = run(dataclasses.replace(config, name="adamw"))
    for path in (("embed", "embedding"), ("layers", "fc1", "weight")):
        leaves = [functools.reduce(dict.__getitem__, path, tree[-1]) for tree in (found, adamw)]
        np.testing.assert_array_equal(*leaves)
    expected = random_tree(0)["layers"]["fc1"]["kernel"]
    momentum = np.zeros_like(expected)
    for step in range(4):
        g = random_tree(step + 1)["layers"]["fc1"]["kernel"]
        momentum = 0.9 * momentum + 0.1 * g
        # Nesterov's step with the bias corrections of NAdam.
        nesterov = 0.9 * momentum / (1 - 0.9 ** (step + 2)) + 0.1 * g / (1 - 0.9 ** (step + 1))
        change = np.stack([orthogonalized(matrix) for matrix in nesterov]) * 0.2 * math.sqrt(5)
        expected = expected - config.lr * (change + config.weight_decay * expected)
    np.testing.assert_allclose(found[-1]["layers"]["fc1"]["kernel"], expected, rtol=2e-5, atol=2e-5)


def test_selected_parameters_have_no_weight_decay():
    base = OptimConfig(lr=0.1, warmup_steps=0, schedule="constant", weight_decay=0.3)
    some = dataclasses.replace(base, no_weight_decay=("*.embedding", "layers.*.w*"))
    none = dataclasses.replace(base, weight_decay=0.0)
    found, decayed, plain = run(some)[-1], run(base)[-1], run(none)[-1]
    chex.assert_trees_all_equal(found["embed"], plain["embed"])
    chex.assert_trees_all_equal(found["layers"]["fc1"]["weight"], plain["layers"]["fc1"]["weight"])
    chex.assert_trees_all_equal(
        found["layers"]["fc1"]["kernel"], decayed["layers"]["fc1"]["kernel"]
    )
    assert (
        np.abs(decayed["layers"]["fc1"]["weight"] - plain["layers"]["fc1"]["weight"]).max() > 1e-3
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_selected_parameters_have_their_own_learning_rate(name):
    config = OptimConfig(name=name, lr=0.1, warmup_steps=1, weight_decay=0.3)
    scaled = dataclasses.replace(config, scaled_lr=("embed.*", "*.kernel"), lr_scale=0.25)
    slow = dataclasses.replace(config, lr=0.025)
    found, fast, slow = run(scaled), run(config), run(slow)
    for mixed, at_lr, at_quarter in zip(found, fast, slow, strict=True):
        chex.assert_trees_all_close(mixed["embed"], at_quarter["embed"], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(
            mixed["layers"]["fc1"]["weight"], at_lr["layers"]["fc1"]["weight"]
        )
        np.testing.assert_allclose(
            mixed["layers"]["fc1"]["kernel"],
            at_quarter["layers"]["fc1"]["kernel"],
            rtol=1e-5,
            atol=1e-7,
        )
    difference = found[-1]["embed"]["embedding"] - fast[-1]["embed"]["embedding"]
    assert np.abs(difference).max() > 1e-2
    # A resumed run may change them: they have no state.
    start = float32(random_tree(0))
    states = [make_optimizer(c, total_steps=TOTAL).init(start) for c in (config, scaled)]
    chex.assert_trees_all_equal_structs(*states)
    with pytest.raises(ConfigError, match=r"optim.lr_scale is 0.25 and optim.scaled_lr is empty"):
        dataclasses.replace(scaled, scaled_lr=())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay_and_have_no_state(name):
    config = OptimConfig(name=name, lr=0.1, warmup_steps=0, frozen=("embed.*", "*.weight"))
    found = run(config)
    start = float32(random_tree(0))
    chex.assert_trees_all_equal(found[-1]["embed"], start["embed"])
    chex.assert_trees_all_equal(
        found[-1]["layers"]["fc1"]["weight"], start["layers"]["fc1"]["weight"]
    )
    assert np.abs(found[-1]["layers"]["fc1"]["kernel"] - start["layers"]["fc1"]["kernel"]).min() > 0
    state = make_optimizer(config, total_steps=TOTAL).init(start)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim > 1}
    assert shapes == {SHAPES["kernel"]}


@pytest.mark.parametrize("setting", ["frozen", "no_weight_decay", "scaled_lr"])
def test_a_pattern_without_parameter_is_refused(setting):
    optimizer = make_optimizer(OptimConfig(**{setting: ("*.kernels",)}), total_steps=TOTAL)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=rf"optim.{setting} has '\*.kernels', .*layers.fc1.kernel"
    ):
        optimizer.init(float32(random_tree(0)))


def test_the_schedule_needs_its_decay_steps():
    with pytest.raises(ConfigError, match="wsd needs decay_steps"):
        OptimConfig(schedule="wsd")
    with pytest.raises(ConfigError, match="others need 0"):
        OptimConfig(decay_steps=3)
    with pytest.raises(ConfigError, match="4 and 7, together longer than the run of steps = 10"):
        TrainConfig(optim=OptimConfig(schedule="wsd", decay_steps=7, warmup_steps=4), steps=10)


def test_the_average_is_that_of_a_loop_in_numpy():
    values = [random_tree(step) for step in range(200)]
    average, expected = float32(values[0]), values[0]["embed"]["embedding"]
    update = jax.jit(lambda *a, count: update_average(*a, decay=0.93, count=count))
    for t, value in enumerate(values[1:]):
        average = update(average, float32(value), count=jnp.asarray(t))
        d = min(0.93, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * value["embed"]["embedding"]
    np.testing.assert_allclose(average["embed"]["embedding"], expected, rtol=1e-4, atol=1e-5)
