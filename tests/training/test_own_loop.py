"""`train` with the caller's batches, loss, optimizer, callbacks and writers."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from megalodon_jax.checkpoints import load_model
from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import ConfigError, DataError
from megalodon_jax.tasks import LanguageModeling
from megalodon_jax.tasks.loaders import OwnBatches
from megalodon_jax.train_state import init_state
from megalodon_jax.training.callbacks import Callback, RunView
from megalodon_jax.training.loop import train
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch, CountedBatch

ROWS, LENGTH = 2, 32


def batch_of(number: int) -> Batch:
    tokens = np.random.default_rng(number).integers(1, 9, (ROWS, LENGTH + 1), np.int32)
    ones = np.ones((ROWS, LENGTH))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.int32), ones.astype(np.float32))


def endless() -> Iterator[Batch]:
    return map(batch_of, itertools.count())


class Stateful:
    """An iterator that knows its position."""

    def __init__(self) -> None:
        self.number, self.read, self.is_closed = 0, [], False

    def __iter__(self) -> "Stateful":
        return self

    def __next__(self) -> Batch:
        self.read.append(self.number)
        self.number += 1
        return batch_of(self.number - 1)

    def state_dict(self) -> dict:
        return {"number": self.number}

    def load_state_dict(self, state: dict) -> None:
        self.number = state["number"]

    def close(self) -> None:
        self.is_closed = True


class Recorder(Callback):
    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.stop_at = stop_at

    def on_start(self, run):
        self.events.append(("start", run.step))

    def on_step(self, run: RunView, metrics):
        assert int(run.state.step) == run.step
        self.events.append(("step", run.step))
        if run.step == self.stop_at:
            run.stop()

    def on_report(self, run, metrics):
        assert metrics["learning_rate"] == pytest.approx(3e-3)
        self.events.append(("report", run.step))

    def on_evaluation(self, run, evaluation):
        logits, _ = run.model()(np.ones((1, 5), np.int32))
        assert logits.shape == (1, 5, 257)
        self.events.append(("evaluation", run.step))

    def on_save(self, run):
        self.events.append(("save", run.step))

    def on_end(self, run, result):
        assert result.step == run.step
        self.events.append(("end", run.step))


class Lines:
    def __init__(self) -> None:
        self.points: list[tuple[int, dict]] = []
        self.texts: list[tuple[int, str, str]] = []
        self.closed = 0

    def write(self, step, metrics):
        self.points.append((step, dict(metrics)))

    def write_text(self, step, name, text):
        self.texts.append((step, name, text))

    def close(self):
        self.closed += 1


def optimizer() -> optax.GradientTransformation:
    return optax.inject_hyperparams(optax.sgd)(learning_rate=3e-3, momentum=0.9)


def heldout() -> dict:
    return {"a": lambda: map(batch_of, (901, 902)), "b": lambda: [CountedBatch(batch_of(903), 50)]}


def params_of(config: TrainConfig) -> nnx.State:
    return nnx.split(load_model(config.run_dir).model)[1]


@pytest.fixture
def config(config) -> TrainConfig:
    return dataclasses.replace(config, sample_tokens=0)


@pytest.mark.slow
def test_events_metrics_and_evaluation(config):
    recorder, lines, batches = Recorder(), Lines(), Stateful()
    result = train(
        config, loader=batches, heldout=heldout(), optimizer=optimizer(), callbacks=[recorder],
        writers=[lines],
    )  # fmt: skip
    steps = [[("step", i), ("report", i)] + [("save", i)] * (i % 3 == 0) for i in range(1, 7)]
    expected = [("start", 0), *itertools.chain(*steps), ("evaluation", 6), ("end", 6)]
    assert recorder.events == expected
    assert batches.read == list(range(6))
    assert batches.is_closed
    assert lines.closed == 1
    assert not Path(config.run_dir, "tensorboard").exists()
    text = Path(config.run_dir, "metrics.jsonl").read_text()
    written = [json.loads(line) for line in text.splitlines()]
    assert [entry["step"] for entry in written] == [step for step, _ in lines.points]
    assert [entry.get("loss") for entry in written] == [p.get("loss") for _, p in lines.points]
    assert result.heldout is not None
    assert np.isnan(result.heldout.bits_per_byte)  # the bytes of set "a" are not known
    last = written[-1]
    assert last["heldout_bits_per_byte/b"] == pytest.approx(
        last["heldout_loss/b"] * ROWS * LENGTH / 50 / np.log(2)
    )
    # The gradient of plain SGD with momentum, in one step from the initial parameters.
    step_config = dataclasses.replace(
        config, run_dir=config.run_dir + "_2", steps=1,
        optim=dataclasses.replace(config.optim, warmup_steps=0),
    )  # fmt: skip
    train(step_config, loader=endless(), optimizer=optax.sgd(3e-3))
    graphdef, state = init_state(config)
    batch = batch_of(0)

    def loss(params):
        model = nnx.merge(graphdef, params)
        sums = LanguageModeling().loss(model, batch, config=config)
        return sums.loss_sum / sums.weight_sum

    updated = jax.tree.map(lambda p, g: p - 3e-3 * g, state.params, jax.grad(loss)(state.params))
    chex.assert_trees_all_close(params_of(step_config), updated, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [endless, Stateful])
def test_a_resumed_run_equals_an_uninterrupted_one(config, make):
    whole = dataclasses.replace(config, run_dir=config.run_dir + "_whole")
    train(whole, loader=make(), optimizer=optimizer())
    stopped = train(config, loader=make(), optimizer=optimizer(), callbacks=[Recorder(stop_at=2)])
    assert (stopped.step, stopped.stop_signal) == (2, None)
    again, resumed = make(), dataclasses.replace(config, resume=True)
    assert train(resumed, loader=again, optimizer=optimizer()).step == 6
    chex.assert_trees_all_equal(params_of(config), params_of(whole))
    if isinstance(again, Stateful):
        assert again.read == [2, 3, 4, 5]


class EveryOther(LanguageModeling):
    def loss(self, model, batch, *, config, dropout_key=None):
        weights = batch.weights.at[:, ::2].set(0.0)
        return super().loss(model, batch._replace(weights=weights), config=config)


@pytest.mark.slow
def test_a_loss_of_your_own(config):
    graphdef, state = init_state(config)
    batch = jax.tree.map(lambda a: np.asarray(a)[None], batch_of(0))
    halved = batch._replace(weights=batch.weights * (np.arange(LENGTH) % 2).astype(np.float32))
    step = make_train_step(graphdef, config, task=EveryOther())
    expected = make_train_step(graphdef, config)(jax.tree.map(np.asarray, state), halved)
    chex.assert_trees_all_equal(step(state, batch), expected)


@pytest.mark.slow
def test_an_update_that_is_not_finite_is_skipped(config):
    def update(updates, state, params=None):
        factor = jax.numpy.where(state == 1, np.inf, -1e-3)
        return jax.tree.map(lambda g: g * factor, updates), state + 1

    broken = optax.GradientTransformation(lambda params: jax.numpy.zeros((), int), update)
    graphdef, state = init_state(config, optimizer=broken)
    step = make_train_step(graphdef, config, optimizer=broken)
    batch = jax.tree.map(lambda a: np.asarray(a)[None], batch_of(0))
    state, _ = step(state, batch)
    before = jax.device_get(state.params)
    # A skipped update keeps the optimizer's state too: it fails again.
    for skipped in (1, 2):
        state, metrics = step(state, batch)
        assert int(metrics.skipped) == skipped
        chex.assert_trees_all_equal(jax.device_get(state.params), before)
    assert np.isnan(metrics.learning_rate)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (
            [batch_of(0)._replace(tokens=np.ones((2, 31), int))],
            r"tokens of batch 0 has shape \(2, 31\)",
        ),
        ([batch_of(0)._replace(targets=np.ones((2, 32)))], "targets of batch 0 .* dtype float64"),
        ([{"tokens": 1}], "batch 0 is of type dict; give megalodon_jax.Batch"),
        ([], "the batches ended after 0; give an endless iterator"),
    ],
)
def test_wrong_batches_are_refused(batches, message):
    with pytest.raises(DataError, match=message):
        next(OwnBatches(batches, rows=ROWS, seq_len=LENGTH))


def test_states_of_other_loaders_are_refused(config):
    own = OwnBatches(endless(), rows=ROWS, seq_len=LENGTH)
    next(own)
    state = own.state_dict()
    with pytest.raises(DataError, match="saved with another loader"):
        own.load_state_dict({"shards": {"0": {"readers": []}}, "settings": {}})
    with pytest.raises(DataError, match="had a state_dict when"):
        OwnBatches(Stateful(), rows=ROWS, seq_len=LENGTH).load_state_dict(state)
    with pytest.raises(DataError, match="saved by 2 processes"):
        own.load_state_dict({**state, "settings": {"num_shards": 2}})
    with pytest.raises(ConfigError, match="held-out batches were given without training batches"):
        train(config, heldout=heldout())
