"""Checkpoints: bitwise restore, damaged and unfinished ones, and mismatched models."""

import dataclasses
import resource
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.checkpoints import RunCheckpoints, load_model
from megalodon_jax.errors import CheckpointError, MismatchError
from megalodon_jax.model import Megalodon
from megalodon_jax.train_state import TrainState, init_state

LOADER_STATE = {"version": 1, "position": {"rows": [1, 2, 3]}}


@pytest.fixture
def state(session_config) -> TrainState:
    return init_state(session_config)[1]


def at_step(state: TrainState, step: int) -> TrainState:
    """A state whose arrays differ between steps."""
    moved = jax.tree.map(lambda leaf: leaf + step, (state.params, state.opt_state))
    return TrainState(jnp.asarray(step, jnp.int32), *moved)


def save(checkpoints: RunCheckpoints, state: TrainState, config) -> None:
    checkpoints.save(state, loader_state=LOADER_STATE, config=config, tokenizer_fingerprint="bytes")


def save_and_wait(checkpoints: RunCheckpoints, state: TrainState, config) -> None:
    save(checkpoints, state, config)
    checkpoints.wait()


def test_restore_is_bitwise(config, state):
    with RunCheckpoints(config.run_dir, keep=2) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, at_step(state, step), config)
    with RunCheckpoints(config.run_dir, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        restored = checkpoints.restore(3, config)
        assert checkpoints.read_run(3) == (config, "bytes")
    chex.assert_trees_all_equal(restored.state, at_step(state, 3))
    assert restored.loader_state == LOADER_STATE
    assert restored.config == config
    model, saved = load_model(config.run_dir, step=2)
    assert saved == config
    chex.assert_trees_all_equal(nnx.split(model, nnx.Param)[1], at_step(state, 2).params)


def test_another_model_is_rejected_and_its_fields_are_named(config, state):
    with RunCheckpoints(config.run_dir) as checkpoints:
        save(checkpoints, state, config)
        checkpoints.wait()
        other = dataclasses.replace(config.model, model_dim=16, swiglu=True)
        with pytest.raises(MismatchError, match=r"model_dim is 8 .* 16 now; swiglu is False"):
            checkpoints.restore(0, dataclasses.replace(config, model=other))
        # Fields that change only how the model is computed may differ.
        remat = dataclasses.replace(config.model, remat="block", cema_implementation="reference")
        restored = checkpoints.restore(0, dataclasses.replace(config, model=remat))
    chex.assert_trees_all_equal(restored.state.params, state.params)


def test_an_unfinished_checkpoint_is_named_and_ignored(config, state, capsys):
    with RunCheckpoints(config.run_dir) as checkpoints:
        save(checkpoints, at_step(state, 1), config)
    directory = Path(config.run_dir, "checkpoints")
    unfinished = directory / "2.orbax-checkpoint-tmp"
    (unfinished / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    _, saved = load_model(config.run_dir)
    assert saved == config
    assert f"ignoring unfinished checkpoint {unfinished}" in capsys.readouterr().err
    with RunCheckpoints(config.run_dir) as checkpoints:
        assert checkpoints.steps() == [1]


@pytest.mark.parametrize("damage", ["empty", "no params", "truncated"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_loaded(config, state, damage, capsys):
    with RunCheckpoints(config.run_dir, keep=2) as checkpoints:
        save(checkpoints, at_step(state, 1), config)
        save(checkpoints, at_step(state, 2), config)
    newest = Path(config.run_dir, "checkpoints", "2")
    for path in sorted(newest.rglob("*"), reverse=True):
        is_params = "params" in path.parts
        if path.is_file() and damage == "truncated" and is_params and "d" in path.parts:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif damage == "empty" or (damage == "no params" and is_params):
            path.rmdir() if path.is_dir() else path.unlink()
    model, _ = load_model(config.run_dir)
    chex.assert_trees_all_equal(nnx.split(model, nnx.Param)[1], at_step(state, 1).params)
    assert str(newest) in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="checkpoints/2"):
        load_model(config.run_dir, step=2)


def test_a_full_disk_keeps_the_previous_checkpoint(config, state):
    # Incompressible, so that the file exceeds the limit below.
    noise = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32)
    big = at_step(state, 2)._replace(params=nnx.State({"w": jnp.asarray(noise)}))
    checkpoints = RunCheckpoints(config.run_dir, keep=1)
    save(checkpoints, at_step(state, 1), config)
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"/2 was not written: .*still usable: step 1"):
            save_and_wait(checkpoints, big, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    model, _ = load_model(config.run_dir)
    chex.assert_trees_all_equal(nnx.split(model, nnx.Param)[1], at_step(state, 1).params)


def test_missing_checkpoints_are_an_error(tmp_path, config, state):
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        load_model(tmp_path)
    with RunCheckpoints(config.run_dir) as checkpoints:
        save(checkpoints, state, config)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are: 0"):
        load_model(config.run_dir, step=7)


def test_bfloat16_weights_keep_their_dtype(config):
    model = dataclasses.replace(config.model, param_dtype="bfloat16")
    config = dataclasses.replace(config, model=model)
    state = init_state(config)[1]
    with RunCheckpoints(config.run_dir) as checkpoints:
        save(checkpoints, state, config)
    loaded, _ = load_model(config.run_dir)
    assert isinstance(loaded, Megalodon)
    chex.assert_trees_all_equal(nnx.split(loaded, nnx.Param)[1], state.params)
    assert loaded.embed.embedding.dtype == jnp.bfloat16
