"""The train step (accumulation, padding, dropout keys) and the evaluation step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.config import OptimConfig
from megalodon_jax.train_state import (
    TrainState,
    abstract_run_model,
    abstract_state,
    init_state,
    run_values,
)
from megalodon_jax.training.step import make_eval_step, make_train_step
from megalodon_jax.typing import Batch


def random_batch(rows: int, length: int = 16, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    segment_ids = np.ones((rows, length), np.int32)
    segment_ids[:, length // 2 :] = 2
    # Rows have different numbers of targets, so that a mean of row means would be wrong.
    weights = random.random((rows, length)) < np.linspace(0.2, 1.0, rows)[:, None]
    tokens, targets = random.integers(0, 257, (2, rows, length)).astype(np.int32)
    return jax.tree.map(jnp.asarray, Batch(tokens, targets, segment_ids, np.float32(weights)))  # type: ignore[arg-type]


def copy_of(state: TrainState) -> TrainState:
    """A copy, because the step donates its state."""
    return jax.tree.map(jnp.copy, state)


@pytest.fixture(scope="module")
def no_warmup(session_config):
    return dataclasses.replace(session_config, optim=OptimConfig(lr=1e-2, warmup_steps=0))


@pytest.fixture(scope="module")
def step_and_state(no_warmup):
    """The jitted step, compiled once per shape, and the state of step 0."""
    graphdef, state = init_state(no_warmup)
    return make_train_step(graphdef, no_warmup), state


@pytest.mark.slow
def test_runs_of_other_rates_steps_and_seeds_share_a_program(no_warmup):
    """Nothing compiles anew between the points of a grid, nor when a run is made longer."""
    other = dataclasses.replace(
        no_warmup, steps=77, seed=2**32 - 1,
        optim=dataclasses.replace(no_warmup.optim, lr=3e-4, warmup_steps=5, end_ratio=0.3),
    )  # fmt: skip
    batch = jax.tree.map(lambda rows: rows[None], random_batch(rows=2))
    texts = []
    for config in (no_warmup, other):
        state = abstract_state(config)
        graphdef = abstract_run_model(config).graphdef
        texts.append(make_train_step(graphdef, config).lower(state, batch).as_text())
    assert texts[0] == texts[1]
    # The values themselves are those of each run.
    values = run_values(other)
    assert float(values.schedule.lr) == np.float32(3e-4)
    assert (float(values.schedule.total), float(values.schedule.warmup)) == (77, 5)
    key = jax.random.key(other.seed)
    assert jax.random.bits(jax.random.key(values.seed)) == jax.random.bits(key)


@pytest.mark.slow
def test_accumulation_equals_one_big_batch(step_and_state):
    step, state = step_and_state
    whole = random_batch(rows=4)
    whole_state, metrics = step(copy_of(state), jax.tree.map(lambda rows: rows[None], whole))
    halves = jax.tree.map(lambda rows: rows.reshape(2, 2, -1), whole)
    accumulated, accumulated_metrics = step(copy_of(state), halves)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6),
        whole_state.params,
        accumulated.params,
    )
    for name in ("loss", "accuracy", "grad_norm", "tokens"):
        np.testing.assert_allclose(
            getattr(metrics, name), getattr(accumulated_metrics, name), rtol=2e-6
        )
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), whole_state.params, state.params)
    assert max(map(float, jax.tree.leaves(moved))) > 1e-3


@pytest.mark.slow
def test_a_batch_of_padding_only_decays_the_weights(no_warmup, step_and_state):
    step, state = step_and_state
    empty = jax.tree.map(lambda rows: np.zeros_like(rows)[None], random_batch(rows=4))
    after, metrics = step(copy_of(state), empty)
    assert float(metrics.tokens) == 0.0
    assert float(metrics.loss) == 0.0
    assert float(metrics.grad_norm) == 0.0
    decay = 1.0 - no_warmup.optim.lr * no_warmup.optim.weight_decay
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, decay * b, rtol=1e-6, atol=1e-9),
        after.params,
        state.params,
    )


@pytest.mark.slow
def test_dropout_depends_on_seed_and_step_only(no_warmup):
    model = dataclasses.replace(no_warmup.model, dropout=0.5)
    config = dataclasses.replace(no_warmup, model=model)
    graphdef, state = init_state(config)
    step = make_train_step(graphdef, config)
    batch = jax.tree.map(lambda rows: rows[None], random_batch(rows=2))

    def loss_at(index: int) -> float:
        indexed = copy_of(state)._replace(step=jnp.asarray(index, jnp.int32))
        return float(step(indexed, batch)[1].loss)

    assert loss_at(3) == loss_at(3)
    assert loss_at(3) != loss_at(4)


def test_evaluation_step_equals_numpy_cross_entropy(session_config):
    graphdef, state = init_state(session_config)
    batch = random_batch(rows=2)
    sums = make_eval_step(graphdef, session_config)(state.params, batch)

    @jax.jit
    def call(params: nnx.State) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return model(batch.tokens, segment_ids=batch.segment_ids).logits

    logits = np.asarray(call(state.params), np.float64)
    log_z = np.log(np.sum(np.exp(logits), axis=-1))
    chosen = np.take_along_axis(logits, np.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    expected = np.sum((log_z - chosen) * batch.weights)
    np.testing.assert_allclose(float(sums.loss_sum), expected, rtol=1e-6)
    np.testing.assert_allclose(float(sums.weight_sum), np.sum(batch.weights))
