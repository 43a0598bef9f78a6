"""Resuming from a chosen step, the checkpoints that a run keeps, and `megalodon verify`."""

import dataclasses
from pathlib import Path

import chex
import pytest
from flax import nnx

from megalodon_jax.checkpoints import RunCheckpoints, load_model, verify_run
from megalodon_jax.cli.main import main
from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import CheckpointError, ConfigError, DataError
from megalodon_jax.training.loop import train


def names(config: TrainConfig) -> set[str]:
    return {path.name for path in Path(config.run_dir, "checkpoints").iterdir()} - {"heldout.json"}


@pytest.mark.slow
def test_resuming_from_an_earlier_step_keeps_the_later_ones(trained_run, finished, capsys):
    resumed = dataclasses.replace(finished, resume=True, resume_step=3)
    assert train(resumed).step == 6
    assert names(finished) == {"3", "6", "later_6"}
    assert "later checkpoints are kept as later_6" in capsys.readouterr().out
    first, second = (
        nnx.split(load_model(run.run_dir, step=6).model)[1] for run in (trained_run, finished)
    )
    chex.assert_trees_all_equal(first, second)
    with RunCheckpoints(finished.run_dir) as checkpoints:
        checkpoints.set_aside_after(3)
    assert names(finished) == {"3", "later_6", "later_6_2"}


def test_a_step_that_cannot_be_resumed_changes_nothing(finished):
    at_3 = dataclasses.replace(finished, resume=True, resume_step=3)
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; there are: 3, 6"):
        train(dataclasses.replace(at_3, resume_step=4))
    with pytest.raises(DataError, match="seq_len"):
        train(dataclasses.replace(at_3, data=dataclasses.replace(finished.data, seq_len=16)))
    next(Path(finished.run_dir, "checkpoints", "3").rglob("_sharding")).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints/3 is damaged: .*_sharding is missing"):
        train(at_3)
    assert names(finished) == {"3", "6"}
    with pytest.raises(ConfigError, match="resume_step is 3, but resume is not set"):
        dataclasses.replace(finished, resume_step=3)


@pytest.mark.slow
def test_a_run_keeps_the_newest_the_best_and_every_nth(config, monkeypatch):
    # The held-out loss rises after step 3: its checkpoint is the best.
    from megalodon_jax.training import loop

    evaluate = loop.evaluate_sets
    losses = iter((2.0, 2.1, 2.2, 2.3))

    def evaluate_worse(*arguments, **settings):
        found = evaluate(*arguments, **settings)
        return found._replace(all_sets=found.all_sets._replace(loss=next(losses)))

    monkeypatch.setattr(loop, "evaluate_sets", evaluate_worse)
    config = dataclasses.replace(
        config, steps=12, eval_every=3, keep_checkpoints=1, keep_every=9, sample_tokens=0
    )
    train(config)
    assert names(config) == {"3", "9", "12"}


def test_verify_lists_every_checkpoint_and_its_damage(finished, capsys):
    assert main(["verify", finished.run_dir]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["step 3: good", "step 6: good"]
    newest = Path(finished.run_dir, "checkpoints", "6")
    data = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    (newest / "run" / "metadata").unlink()
    for path in Path(finished.run_dir, "checkpoints", "3").glob("manifest_*"):
        path.unlink()
    assert main(["verify", finished.run_dir]) == 1
    out = capsys.readouterr().out
    assert "step 3: incomplete (checkpoint" in out
    assert "step 6: damaged (" in out
    assert f"  {data.relative_to(newest)} has another checksum\n" in out
    assert "  run/metadata is missing\n" in out
    assert [report.state for report in verify_run(finished.run_dir)] == ["incomplete", "damaged"]


def test_verify_needs_checkpoints(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "has no checkpoints" in capsys.readouterr().err
