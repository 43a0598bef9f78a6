"""Checkpoints in a store: what holds on a disk holds there."""

import threading
import time

import chex
import jax
import pytest
from flax import nnx

import megalodon_jax
from megalodon_jax.checkpoints import RunCheckpoints, load_model, restore_for_resume, verify_run
from megalodon_jax.checkpoints.directory import open_directory
from megalodon_jax.checkpoints.lock import FOLDER, RunLock
from megalodon_jax.data.tokenizer import ByteTokenizer
from megalodon_jax.errors import (
    CheckpointError,
    ConfigError,
    RunLockedError,
    StoreUnreachableError,
)
from megalodon_jax.parallel.mesh import resolve_mesh
from megalodon_jax.train_state import TrainState, init_state
from tests.checkpoints.test_manager import LOADER_STATE, at_step, on_disk, save, save_and_wait


@pytest.fixture(scope="module")
def state(session_config) -> TrainState:
    return init_state(session_config)[1]


def resume(config) -> int:
    with RunCheckpoints(config.run_dir) as checkpoints:
        mesh = resolve_mesh(config)
        restored = restore_for_resume(checkpoints, config, mesh, load_data=lambda _: None)
        return int(restored.state.step)


@pytest.mark.slow
def test_restore_is_bitwise_and_old_ones_go(stored, state):
    with RunCheckpoints(stored.run_dir, keep=2) as checkpoints:
        for step in (1, 2, 3):
            save_and_wait(checkpoints, at_step(state, step), stored)
            checkpoints.confirm(step)
        assert on_disk(checkpoints) == [2, 3]
        # Losses are kept beside the checkpoints.
        checkpoints.report_heldout(2, 1.0)
    with RunCheckpoints(stored.run_dir, read_only=True) as checkpoints:
        assert checkpoints.steps() == checkpoints.complete_steps() == [2, 3]
        restored = checkpoints.restore(3, stored)
        assert checkpoints.read_run(3) == (stored, "bytes")
    chex.assert_trees_all_equal(restored.state, at_step(state, 3))
    assert restored.loader_state == LOADER_STATE
    model, saved = load_model(stored.run_dir, step=2)
    assert saved == stored
    chex.assert_trees_all_equal(nnx.split(model, nnx.Param)[1], at_step(state, 2).params)
    assert [report.state for report in verify_run(stored.run_dir)] == ["good", "good"]
    for source, step in ((stored.run_dir, 3), (f"{stored.run_dir}/checkpoints/2", 2)):
        loaded = megalodon_jax.load(source)
        chex.assert_trees_all_equal(
            nnx.split(loaded.model, nnx.Param)[1], at_step(state, step).params
        )
        assert isinstance(loaded.tokenizer, ByteTokenizer)


@pytest.mark.slow
def test_a_damaged_one_is_set_aside_and_an_unfinished_one_removed(stored, store, state, capsys):
    with RunCheckpoints(stored.run_dir, keep=3) as checkpoints:
        for step in (1, 2, 3):
            save_and_wait(checkpoints, at_step(state, step), stored)
    prefix = "run/checkpoints/3/params/d/"
    damaged = next(name for name in store.names() if name.startswith(prefix))
    content = bytearray(store.read(damaged))
    content[len(content) // 2] ^= 1
    store.write(damaged, bytes(content))
    manifest = "run/checkpoints/2/manifest_0_of_1.txt"
    store.files.rm_file(store.key(manifest))
    # As after a kill in the middle of a save.
    store.write("run/checkpoints/4/params/d/abc", b"part")
    reports = [str(report) for report in verify_run(stored.run_dir)]
    assert reports[0].startswith("step 1: good")
    assert reports[1].startswith("step 2: incomplete")
    assert reports[2].startswith("step 3: damaged")
    assert f"{damaged.removeprefix('run/checkpoints/3/')} has another checksum" in reports[2]
    assert len(reports) == 3
    before = store.names()
    # Reading changes nothing.
    model, _ = load_model(stored.run_dir)
    chex.assert_trees_all_equal(nnx.split(model, nnx.Param)[1], at_step(state, 1).params)
    assert "ignoring unfinished checkpoint" in capsys.readouterr().err
    assert store.names() == before
    assert resume(stored) == 1
    errors = capsys.readouterr().err
    assert f"removing unfinished checkpoint {stored.run_dir}/checkpoints/4" in errors
    assert "damaged checkpoint, trying the previous one" in errors
    found = {name.split("/")[2] for name in store.names() if name.startswith("run/checkpoints/")}
    assert found == {"1", "incomplete_2", "damaged_3"}
    moved = damaged.replace("checkpoints/3", "checkpoints/damaged_3")
    assert store.read(moved) == bytes(content)
    # The steps are free again, also for Orbax.
    with RunCheckpoints(stored.run_dir, keep=3) as checkpoints:
        for step in (2, 3):
            save_and_wait(checkpoints, at_step(state, step), stored)
        assert checkpoints.complete_steps() == [1, 2, 3]


def test_a_former_owner_writes_nothing(stored, store, state):
    checkpoints = RunCheckpoints(stored.run_dir)
    save_and_wait(checkpoints, at_step(state, 1), stored)
    lock = open_directory(stored.run_dir).child(FOLDER)
    lock.create(f"{int(lock.names()[-1]) + 1:08d}", b"another owner")
    before = store.names()
    with pytest.raises(RunLockedError, match="was taken over by"):
        save(checkpoints, at_step(state, 2), stored)
    checkpoints.close()
    assert store.names() == before


@pytest.mark.slow
def test_a_takeover_during_a_save_prevents_its_commit(stored, store, state, monkeypatch):
    checkpoints = RunCheckpoints(stored.run_dir)
    save_and_wait(checkpoints, at_step(state, 1), stored)
    lock = open_directory(stored.run_dir).child(FOLDER)
    number = int(lock.names()[-1])
    checked = RunLock.check

    def lose_while_writing(self, **settings):
        if threading.current_thread() is not threading.main_thread():
            lock.create(f"{number + 1:08d}", b"another owner")
        checked(self, **settings)

    monkeypatch.setattr(RunLock, "check", lose_while_writing)
    with pytest.raises(RunLockedError, match="was taken over by"):
        save_and_wait(checkpoints, at_step(state, 2), stored)
    checkpoints.close()
    assert checkpoints.steps() == [1]
    assert "run/checkpoints/2/commit_success.txt" not in store.names()


@pytest.mark.slow
def test_a_refused_save_is_an_error_soon(stored, store, state):
    checkpoints = RunCheckpoints(stored.run_dir)
    save_and_wait(checkpoints, at_step(state, 1), stored)
    store.refusal.touch()
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"/2 was not written: .*still usable: step 1"):
        save_and_wait(checkpoints, at_step(state, 2), stored)
    checkpoints.close()
    assert time.monotonic() - start < 10
    model, _ = load_model(stored.run_dir)
    chex.assert_trees_all_equal(nnx.split(model, nnx.Param)[1], at_step(state, 1).params)


@pytest.mark.slow
def test_a_store_that_gives_no_answer_sets_nothing_aside(stored, store, state, monkeypatch):
    with RunCheckpoints(stored.run_dir) as checkpoints:
        for step in (1, 2):
            save_and_wait(checkpoints, at_step(state, step), stored)
    from megalodon_jax.checkpoints import reading

    def fail(*_):
        raise OSError("connection lost")

    monkeypatch.setattr(reading, "reader", fail)
    with pytest.raises(StoreUnreachableError, match=r"checkpoints/2 cannot be read: .*lost"):
        resume(stored)
    with RunCheckpoints(stored.run_dir) as checkpoints:
        assert checkpoints.complete_steps() == [1, 2]


def test_several_processes_do_not_write_to_s3(stored, store, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    if store.scheme == "s3":
        with pytest.raises(ConfigError, match="only runs of one process can write; use gs://"):
            RunCheckpoints(stored.run_dir)
        assert store.names() == []


def test_missing_checkpoints_are_an_error(store):
    for run_dir in (f"{store.url}/none", f"{store.scheme}://no-such-bucket/run"):
        with pytest.raises(CheckpointError, match="has no checkpoints"):
            load_model(run_dir)
