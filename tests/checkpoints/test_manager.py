"""Checkpoints: bitwise restore, damaged and unfinished ones, and mismatched models."""

import dataclasses
import resource
import threading
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.checkpoints import RunCheckpoints, load_model
from megalodon_jax.checkpoints.directory import LocalDirectory
from megalodon_jax.checkpoints.lock import RunLock
from megalodon_jax.errors import CheckpointError, MismatchError, RunLockedError
from megalodon_jax.model import Megalodon
from megalodon_jax.train_state import TrainState, init_state

LOADER_STATE = {"version": 1, "position": {"rows": [1, 2, 3]}}


@pytest.fixture
def state(session_config) -> TrainState:
    return init_state(session_config)[1]


def at_step(state: TrainState, step: int) -> TrainState:
    """A state whose arrays differ between steps."""
    moved = jax.tree.map(lambda leaf: leaf + step, (state.params, state.opt_state, state.guard))
    return TrainState(jnp.asarray(step, jnp.int32), *moved, values=state.values)


def save(checkpoints: RunCheckpoints, state: TrainState, config) -> None:
    checkpoints.save(state, loader_state=LOADER_STATE, config=config, tokenizer_fingerprint="bytes")


def save_and_wait(checkpoints: RunCheckpoints, state: TrainState, config) -> None:
    save(checkpoints, state, config)
    checkpoints.wait()


def test_restore_is_bitwise(config, state):
    with RunCheckpoints(config.run_dir, keep=2) as checkpoints:
        for step in (1, 2, 3):
            save_and_wait(checkpoints, at_step(state, step), config)
            checkpoints.confirm(step)
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


def on_disk(checkpoints: RunCheckpoints) -> list[int]:
    """Steps after the deletions in progress."""
    for thread in threading.enumerate():
        if thread.name == "remove_checkpoints":
            thread.join()
    return checkpoints.steps()


def test_a_checkpoint_replaces_another_after_a_later_finite_loss(config, state):
    with RunCheckpoints(config.run_dir, keep=1) as checkpoints:
        save_and_wait(checkpoints, at_step(state, 1), config)
        checkpoints.confirm(1)
        save_and_wait(checkpoints, at_step(state, 4), config)
        # The loss of step 4 is that of the parameters before it.
        checkpoints.confirm(3)
        assert on_disk(checkpoints) == [1, 4]
        checkpoints.confirm(4)
        assert on_disk(checkpoints) == [4]
        # While a save is in progress nothing is deleted in favor of it.
        save(checkpoints, at_step(state, 5), config)
        checkpoints.confirm(5)
        assert on_disk(checkpoints)[0] in (4, 5)
        checkpoints.wait()
        checkpoints.confirm(5)
        assert on_disk(checkpoints) == [5]


def test_the_best_and_every_nth_checkpoint_are_kept_also_after_a_resume(config, state):
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.4, 5: 2.3}
    for steps in ((1, 2, 3), (4, 5)):
        with RunCheckpoints(config.run_dir, keep=1, keep_every=3) as checkpoints:
            for step in steps:
                checkpoints.report_heldout(step, losses[step])
                save_and_wait(checkpoints, at_step(state, step), config)
                checkpoints.confirm(step)
                on_disk(checkpoints)
    with RunCheckpoints(config.run_dir, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 3, 5]


def test_a_manifest_is_written_and_damage_found(config, state):
    with RunCheckpoints(config.run_dir, keep=2) as checkpoints:
        save_and_wait(checkpoints, at_step(state, 1), config)
        checkpoints.verify(1)
        restored = checkpoints.restore(1, config)
        found = Path(config.run_dir, "checkpoints", "1").rglob("*")
        files = [path for path in found if path.is_file() and "manifest_" not in path.name]
        assert checkpoints.verification is not None
        assert checkpoints.verification.num_files >= len(files)
        chex.assert_trees_all_equal(restored.state, at_step(state, 1))
    # A bit of an array that Orbax would read without complaint.
    data = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with RunCheckpoints(config.run_dir) as checkpoints:
        with pytest.raises(CheckpointError, match=f"is damaged: .*{data.name} has another"):
            checkpoints.restore(1, config)
        # Only what is read is compared.
        assert "opt_state" in data.parts
        checkpoints.restore_model(1, config.model)


def test_a_second_owner_is_refused_before_anything_is_touched(config, state):
    with RunCheckpoints(config.run_dir) as checkpoints:
        save_and_wait(checkpoints, at_step(state, 1), config)
        in_progress = Path(config.run_dir, "checkpoints", "2.orbax-checkpoint-tmp")
        in_progress.mkdir()
        with pytest.raises(RunLockedError, match="is in use by pid"):
            RunCheckpoints(config.run_dir)
        assert in_progress.is_dir()
        # Readers need no lock.
        assert load_model(config.run_dir).config == config
    RunCheckpoints(config.run_dir).close()
    assert not in_progress.exists()


def test_a_former_owner_writes_nothing(config, state):
    checkpoints = RunCheckpoints(config.run_dir)
    save_and_wait(checkpoints, at_step(state, 1), config)
    lock = LocalDirectory(Path(config.run_dir, ".lock"))
    number = int(lock.names()[-1])
    lock.create(f"{number + 1:08d}", b"another owner")
    before = sorted(Path(config.run_dir).rglob("*"))
    with pytest.raises(RunLockedError, match="was taken over by"):
        checkpoints.check()
    with pytest.raises(RunLockedError, match="was taken over by"):
        save(checkpoints, at_step(state, 2), config)
    checkpoints.close()
    assert sorted(Path(config.run_dir).rglob("*")) == before


def test_a_takeover_during_a_save_prevents_its_commit(config, state, monkeypatch):
    checkpoints = RunCheckpoints(config.run_dir)
    save_and_wait(checkpoints, at_step(state, 1), config)
    lock = LocalDirectory(Path(config.run_dir, ".lock"))
    number = int(lock.names()[-1])
    checked = RunLock.check

    def lose_while_writing(self, **settings):
        if threading.current_thread() is not threading.main_thread():
            lock.create(f"{number + 1:08d}", b"another owner")
        checked(self, **settings)

    monkeypatch.setattr(RunLock, "check", lose_while_writing)
    with pytest.raises(RunLockedError, match="was taken over by"):
        save_and_wait(checkpoints, at_step(state, 2), config)
    checkpoints.close()
    assert checkpoints.steps() == [1]


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


@pytest.mark.slow
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
