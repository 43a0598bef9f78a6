"""Runs whose rows continue those of the batch before: resuming, accumulation, skipped updates."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megalodon_jax.cache import CarriedState, LayerCache
from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.compiled.hlo import parse_program
from megalodon_jax.config import MeshConfig, OptimConfig, TrainConfig, TransformerConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.loss import LossOutput
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.tasks import LanguageModeling
from megalodon_jax.train_state import TrainState, abstract_state, init_state
from megalodon_jax.training.callbacks import Callback, RunView
from megalodon_jax.training.loop import train
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch

WINDOW = 5
# No multiple of the chunk size (16).
LENGTH = 27


class KeepState(Callback):
    """Keeps the state at the end of a run, and the carried fractions of its reports."""

    def __init__(self) -> None:
        self.fractions: list[float] = []

    def on_report(self, run: RunView, report) -> None:
        self.fractions.append(report["carried_tokens"])

    def on_end(self, run: RunView, result) -> None:
        self.state = jax.device_get(run.state)


@pytest.fixture(scope="module")
def carrying(session_config) -> TrainConfig:
    return dataclasses.replace(
        session_config,
        data=dataclasses.replace(session_config.data, carry_state=True, seq_len=LENGTH),
        optim=OptimConfig(lr=1e-2, warmup_steps=0, ema_decay=0.9),
        spike_window=WINDOW,
        spike_threshold=4.0,
        on_spike="skip",
        sample_tokens=0,
    )


@pytest.fixture(scope="module")
def step_and_state(carrying):
    graphdef, state = init_state(carrying)
    return make_train_step(graphdef, carrying), state


def copy_of(state: TrainState) -> TrainState:
    """A copy, because the step donates its state."""
    return jax.tree.map(jnp.copy, state)


def batch_of(seed: int, *, first: int, weight: float = 1.0) -> Batch:
    """Rows whose documents are number `first`, then another one from column 20 on."""
    tokens = np.random.default_rng(seed).integers(0, 257, (1, 2, LENGTH + 1)).astype(np.int32)
    weights = np.full((1, 2, LENGTH), weight, np.float32)
    segment_ids = np.full((1, 2, LENGTH), first, np.int32)
    segment_ids[..., 20:] += 1
    return Batch(tokens[..., :-1], tokens[..., 1:], segment_ids, weights)  # type: ignore[arg-type]


def carried_of(state: TrainState) -> CarriedState:
    assert state.carried is not None
    return state.carried


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_inside_documents(carrying, tmp_path):
    config = dataclasses.replace(carrying, run_dir=str(tmp_path / "run"))
    whole, resumed = KeepState(), KeepState()
    train(config, callbacks=[whole])
    copy = dataclasses.replace(config, run_dir=str(tmp_path / "copy"), resume=True)
    shutil.copytree(config.run_dir, copy.run_dir)
    for path in Path(copy.run_dir, "checkpoints").glob("6*"):
        shutil.rmtree(path)
    with RunCheckpoints(copy.run_dir, read_only=True) as checkpoints:
        saved = carried_of(checkpoints.restore(3, config).state)
    # The checkpoint is inside documents, with chunks of 16 tokens that are not full.
    np.testing.assert_array_equal(saved.segment, 1)
    assert (np.asarray(saved.position) % 16 > 0).all()
    train(copy, callbacks=[resumed])
    chex.assert_trees_all_equal(resumed.state, whole.state)
    assert resumed.fractions == whole.fractions[3:]
    assert whole.fractions[0] == 0.0
    assert np.mean(whole.fractions[1:]) > 0.7
    # The states matter: without the saved ones the run would differ.
    start_anew = dataclasses.replace(
        carrying, data=dataclasses.replace(carrying.data, batch_size=1)
    )
    with RunCheckpoints(config.run_dir, read_only=True) as checkpoints:
        fresh = carried_of(checkpoints.restore(3, start_anew).state)
    np.testing.assert_array_equal(fresh.segment, [0])


@pytest.mark.slow
def test_a_state_restores_with_blocks_written_out(carrying, step_and_state, tmp_path):
    step, state = step_and_state
    state, _ = step(copy_of(state), batch_of(0, first=2))
    written_out = dataclasses.replace(
        carrying, model=dataclasses.replace(carrying.model, scan_layers=False)
    )
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state, loader_state={}, config=carrying, tokenizer_fingerprint="none")
        checkpoints.wait()
        restored = carried_of(checkpoints.restore(1, written_out).state)
    assert len(restored.layers) == carrying.model.num_layers
    chex.assert_trees_all_equal(restored.with_layout(stacked=True), state.carried)


@pytest.mark.slow
def test_accumulated_batches_continue_each_other(step_and_state):
    step, state = step_and_state
    batches = [batch_of(0, first=2), batch_of(1, first=1, weight=0.5)]
    first, first_metrics = step(copy_of(state), batches[0])
    # The second batch with the parameters of the first one.
    second, second_metrics = step(
        copy_of(state)._replace(carried=copy_of(first).carried), batches[1]
    )
    joined = jax.tree.map(lambda *rows: np.concatenate(rows), *batches)
    accumulated, metrics = step(copy_of(state), joined)
    np.testing.assert_allclose(
        float(metrics.loss),
        (2 * float(first_metrics.loss) + float(second_metrics.loss)) / 3,
        rtol=1e-6,
    )
    assert float(first_metrics.carried) == 0.0
    np.testing.assert_allclose(float(second_metrics.carried), 20 / LENGTH, rtol=1e-6)
    np.testing.assert_allclose(float(metrics.carried), 20 / LENGTH / 3, rtol=1e-6)
    chex.assert_trees_all_close(accumulated.carried, second.carried, rtol=1e-6)


@pytest.mark.slow
def test_after_a_loss_that_is_not_finite_documents_begin_anew(step_and_state):
    step, state = step_and_state
    before, _ = step(copy_of(state), batch_of(0, first=2))
    skipped, metrics = step(copy_of(before), batch_of(1, first=1, weight=np.inf))
    assert not np.isfinite(metrics.loss)
    chex.assert_trees_all_equal(skipped.params, before.params)
    np.testing.assert_array_equal(carried_of(skipped).segment, 0)
    np.testing.assert_array_equal(carried_of(skipped).position, 0)
    after, metrics = step(skipped, batch_of(2, first=1))
    # The same rows, as new documents.
    expected, expected_metrics = step(copy_of(before), batch_of(2, first=2))
    assert float(metrics.carried) == 0.0
    assert float(metrics.loss) == float(expected_metrics.loss)
    chex.assert_trees_all_equal(after.carried, expected.carried)


@pytest.mark.slow
def test_a_skipped_spike_keeps_the_state_of_its_rows(step_and_state):
    step, state = step_and_state
    noise = jnp.linspace(0.9, 1.1, WINDOW)
    guard = state.guard._replace(losses=0.01 * noise, count=jnp.asarray(WINDOW, jnp.int32))
    spiked, metrics = step(copy_of(state._replace(guard=guard)), batch_of(0, first=2))
    assert bool(metrics.verdict.is_skipped)
    applied, metrics = step(copy_of(state), batch_of(0, first=2))
    assert not bool(metrics.verdict.is_skipped)
    chex.assert_trees_all_equal(spiked.params, state.params)
    chex.assert_trees_all_equal(spiked.carried, applied.carried)
    np.testing.assert_array_equal(carried_of(spiked).segment, 1)
    np.testing.assert_array_equal(carried_of(spiked).position, LENGTH - 20)


@pytest.mark.slow
def test_a_step_makes_no_copy_of_the_state(carrying):
    """With the state donated, the program copies the new one into the old one's buffer."""
    model = dataclasses.replace(carrying.model, num_layers=3)
    config = dataclasses.replace(carrying, model=model)
    step: Any = make_train_step(abstract_model(model)[0], config)
    state = abstract_state(config)
    lowered = step.lower(state, batch_of(0, first=2))
    others, carried, _ = lowered.args_info[0]
    assert all(info.donated for info in jax.tree.leaves(others))
    assert not any(info.donated for info in jax.tree.leaves(carried))
    program = parse_program(lowered.compile().as_text())
    stacked = carried_of(state).layers
    assert isinstance(stacked, LayerCache)
    key, value = stacked.keys_and_values
    copied = [
        shape.dims
        for instruction, *_ in program.executed()
        if instruction.opcode == "copy"
        for shape in instruction.shapes
    ]
    assert copied
    assert not {key.shape, value.shape} & set(copied)


class OwnLoss(LanguageModeling):
    def loss(self, model, batch, *, config, dropout_key=None) -> LossOutput:
        return super().loss(model, batch, config=config, dropout_key=dropout_key)


class OwnLossWithState(OwnLoss):
    def loss_with_state(self, model, batch, state, *, config, dropout_key=None):
        return super().loss_with_state(model, batch, state, config=config)


def test_what_cannot_carry_a_state_is_refused_by_name(carrying, step_and_state):
    graphdef, _ = init_state(carrying)
    with pytest.raises(ConfigError, match="OwnLoss defines its loss for rows"):
        make_train_step(graphdef, carrying, task=OwnLoss())
    make_train_step(graphdef, carrying, task=OwnLossWithState())
    with pytest.raises(ConfigError, match=r"carry_state is set with mesh.chunk = 2"):
        dataclasses.replace(carrying, mesh=MeshConfig(chunk=2))
    with pytest.raises(ConfigError, match=r"needs whole rows, but mesh.chunk is 8"):
        init_state(carrying, make_mesh(MeshConfig(chunk=8)))
    with pytest.raises(ConfigError, match=r"carry_state is set for model.kind = 'transformer'"):
        dataclasses.replace(carrying, model=TransformerConfig())
