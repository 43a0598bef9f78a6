"""Runs with Muon, frozen parameters and an average: meshes, resumption, what is saved."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.checkpoints import RunCheckpoints, load_model
from megalodon_jax.config import MeshConfig, OptimConfig, TrainConfig
from megalodon_jax.errors import MismatchError
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.train_state import init_state
from megalodon_jax.training.loop import train
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch

OPTIM = OptimConfig(
    name="muon", lr=1e-2, warmup_steps=1, frozen=("embed.*", "*.cema.*"), ema_decay=0.5,
    no_weight_decay=("*.bias",), schedule="wsd", decay_steps=2,
)  # fmt: skip


def params_of(config: TrainConfig, step: int | None = None) -> nnx.State:
    return nnx.split(load_model(config.run_dir, step=step).model)[1]


@pytest.fixture
def with_muon(config) -> TrainConfig:
    return dataclasses.replace(config, optim=OPTIM)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(with_muon, tmp_path, capsys):
    whole = train(with_muon)
    averaged = params_of(with_muon)
    with RunCheckpoints(with_muon.run_dir, read_only=True) as checkpoints:
        state = checkpoints.restore(6, with_muon).state
    chex.assert_trees_all_equal(averaged, state.average)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), averaged, state.params)
    assert max(jax.tree.leaves(differences)) > 1e-4
    assert float(np.max(differences["embed"]["embedding"].get_value())) == 0
    # Interrupted after the checkpoint of step 3.
    resumed = dataclasses.replace(with_muon, resume=True, resume_step=3)
    assert train(resumed)[:3] == whole[:3]
    chex.assert_trees_all_equal(params_of(resumed), averaged)
    other = dataclasses.replace(resumed, optim=dataclasses.replace(OPTIM, frozen=()))
    with pytest.raises(MismatchError, match=r"optim.frozen = \('embed.\*', .*--init_from"):
        train(other)
    # A run that starts from these weights starts from their average.
    capsys.readouterr()
    copy = dataclasses.replace(
        with_muon, run_dir=str(tmp_path / "copy"), init_from=with_muon.run_dir, steps=4,
        optim=OptimConfig(lr=1e-30, warmup_steps=0, weight_decay=0.0), sample_tokens=0,
    )  # fmt: skip
    started = train(copy)
    assert started.heldout is not None
    assert whole.heldout is not None
    assert started.heldout.loss == pytest.approx(whole.heldout.loss, rel=1e-6)


@pytest.mark.slow
def test_a_mesh_changes_nothing(session_config):
    tokens = np.random.default_rng(0).integers(0, 250, (1, 4, 33), np.int32)
    batch = Batch(tokens[..., :-1], tokens[..., 1:], None, np.ones((1, 4, 32), np.float32))
    model = dataclasses.replace(session_config.model, num_heads=2, vocab_size=258)
    optim = dataclasses.replace(OPTIM, eps=1e-3)  # gradients near 0 keep their small updates

    def trained(mesh: MeshConfig):
        config = dataclasses.replace(
            session_config, optim=optim, mesh=mesh, model=model,
            data=dataclasses.replace(session_config.data, batch_size=4),
        )  # fmt: skip
        devices = jax.devices()[:1] if mesh == MeshConfig() else None
        devices = make_mesh(config.mesh, devices)
        graphdef, state = init_state(config, devices)
        step = make_train_step(graphdef, config, devices)
        for _ in range(3):
            state, metrics = step(state, batch)
        return jax.device_get((state.params, state.average, metrics.loss))

    found, expected = trained(MeshConfig(data=4, model=2)), trained(MeshConfig())
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=3e-5)


@pytest.mark.slow
def test_the_loss_falls_under_muon(session_config):
    config = dataclasses.replace(
        session_config, optim=OptimConfig(name="muon", lr=1e-2, warmup_steps=0, schedule="constant")
    )
    graphdef, state = init_state(config)
    step = make_train_step(graphdef, config)
    tokens = np.tile(np.arange(1, 34, dtype=np.int32), (1, 2, 1))
    batch = Batch(tokens[..., :-1], tokens[..., 1:], None, np.ones((1, 2, 32), np.float32))
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.5
    assert int(state.guard.skipped) == 0
