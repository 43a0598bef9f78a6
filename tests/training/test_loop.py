"""Training runs: resuming, stopping, and errors that prevent a start or a resumption."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from megalodon_jax.checkpoints import RunCheckpoints, load_model
from megalodon_jax.config import DataConfig, TrainConfig
from megalodon_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MismatchError,
    TrainingError,
)
from megalodon_jax.training.loop import train
from megalodon_jax.training.metrics import ProgressDisplay


def logged(config: TrainConfig, name: str) -> dict[int, float]:
    lines = Path(config.run_dir, "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return {entry["step"]: entry[name] for entry in entries if name in entry}


def steps_of(config: TrainConfig) -> list[int]:
    with RunCheckpoints(config.run_dir, read_only=True) as checkpoints:
        return checkpoints.steps()


def assert_same_weights(a: TrainConfig, b: TrainConfig) -> None:
    first, second = (nnx.split(load_model(run.run_dir, step=6).model)[1] for run in (a, b))
    chex.assert_trees_all_equal(first, second)


def forget_after(config: TrainConfig, step: int) -> None:
    """Removes everything after the checkpoint of `step`, as if the run had been killed."""
    for later in steps_of(config):
        if later > step:
            shutil.rmtree(Path(config.run_dir, "checkpoints", str(later)))
    Path(config.run_dir, "metrics.jsonl").unlink()


def test_a_run_writes_metrics_and_learns(trained_run):
    loss = logged(trained_run, "loss")
    assert sorted(loss) == [1, 2, 3, 4, 5, 6]
    assert loss[6] < loss[1]
    assert steps_of(trained_run) == [3, 6]
    heldout = logged(trained_run, "heldout_bits_per_byte")
    # Between the entropy of the text and the cost of 257 equally probable ids.
    assert 1.0 < heldout[6] < 8.0
    resolved = json.loads(Path(trained_run.run_dir, "config.json").read_text())
    assert resolved["model"]["model_dim"] == 8


def test_resumed_equals_uninterrupted_bit_for_bit(trained_run, finished):
    forget_after(finished, 3)
    result = train(dataclasses.replace(finished, resume=True))
    assert result.step == 6
    for name in ("loss", "grad_norm"):
        whole = logged(trained_run, name)
        assert logged(finished, name) == {step: whole[step] for step in (4, 5, 6)}
    assert_same_weights(trained_run, finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_saves_after_the_step_and_resuming_changes_nothing(
    number, config, trained_run, monkeypatch
):
    advance = ProgressDisplay.advance

    def advance_and_stop(self, step):
        advance(self, step)
        if step == 2:
            signal.raise_signal(number)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "advance", advance_and_stop)
        result = train(config)
    assert result.step == 2
    assert result.stop_signal == number
    assert signal.getsignal(number) is handler
    assert steps_of(config) == [2]
    if number == signal.SIGTERM:
        train(dataclasses.replace(config, resume=True))
        assert_same_weights(trained_run, config)


def test_nothing_is_overwritten(finished):
    with pytest.raises(ConfigError, match=r"already has checkpoints \(newest: step 6\).*--resume"):
        train(finished)
    assert steps_of(finished) == [3, 6]


def test_resuming_needs_a_checkpoint(config):
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from"):
        train(dataclasses.replace(config, resume=True))


@pytest.mark.slow
def test_auto_resume_begins_and_continues(trained_run, config, finished, capsys):
    config = dataclasses.replace(config, auto_resume=True)
    train(dataclasses.replace(config, steps=2))
    assert "beginning with the first step" in capsys.readouterr().out
    assert steps_of(config) == [2]
    forget_after(finished, 3)
    result = train(dataclasses.replace(finished, auto_resume=True))
    assert "resumed at step 3" in capsys.readouterr().out
    assert result.step == 6
    assert_same_weights(trained_run, finished)


@pytest.mark.slow
def test_auto_resume_after_a_kill_in_the_first_save(trained_run, finished, capsys):
    checkpoints = Path(finished.run_dir, "checkpoints")
    for step in (3, 6):
        next((checkpoints / str(step)).glob("manifest_*")).unlink()
    train(dataclasses.replace(finished, auto_resume=True))
    assert "the save of step 3 was interrupted" in capsys.readouterr().err
    assert steps_of(finished) == [3, 6]
    assert {path.name for path in checkpoints.glob("incomplete_*")} == {
        "incomplete_3", "incomplete_6"
    }  # fmt: skip
    assert_same_weights(trained_run, finished)


def test_auto_resume_does_not_begin_anew_if_checkpoints_are_damaged(finished):
    for step in (3, 6):
        shutil.rmtree(Path(finished.run_dir, "checkpoints", str(step), "opt_state"))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        train(dataclasses.replace(finished, auto_resume=True))
    assert steps_of(finished) == [3, 6]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_renamed_and_saved_again(trained_run, finished, capsys):
    shutil.rmtree(Path(finished.run_dir, "checkpoints", "6", "opt_state"))
    train(dataclasses.replace(finished, resume=True))
    assert "checkpoints/6" in capsys.readouterr().err
    assert steps_of(finished) == [3, 6]
    assert Path(finished.run_dir, "checkpoints", "damaged_6", "params").is_dir()
    assert_same_weights(trained_run, finished)


def test_resuming_another_model_or_other_data_is_rejected(finished):
    model = dataclasses.replace(finished.model, cema_ndim=3)
    with pytest.raises(MismatchError, match="cema_ndim is 2 in the checkpoint, 3 now"):
        train(dataclasses.replace(finished, model=model, resume=True))
    data = dataclasses.replace(finished.data, seq_len=16)
    with pytest.raises(DataError, match="seq_len"):
        train(dataclasses.replace(finished, data=data, resume=True))
    assert steps_of(finished) == [3, 6]


def test_a_loss_that_is_not_finite_stops_the_run(finished, tmp_path):
    broken = dataclasses.replace(finished, run_dir=str(tmp_path / "broken"), resume=True)
    with RunCheckpoints(finished.run_dir, read_only=True) as checkpoints:
        restored = checkpoints.restore(3, finished)
    params = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), restored.state.params)
    with RunCheckpoints(broken.run_dir) as checkpoints:
        checkpoints.save(
            restored.state._replace(params=params),
            loader_state=restored.loader_state,
            config=finished,
            tokenizer_fingerprint="bytes",
        )
    with pytest.raises(TrainingError, match=r"loss is nan .* step 4; .* checkpoint is step 3"):
        train(broken)
    assert steps_of(broken) == [3]


def test_token_ids_outside_the_vocabulary_are_rejected(config):
    small = dataclasses.replace(config.model, vocab_size=256)
    with pytest.raises(ConfigError, match=r"ids up to 256, but the model knows 0 to 255"):
        train(dataclasses.replace(config, model=small))
    assert not Path(config.run_dir).exists()


@pytest.mark.parametrize("content", [b"", b"caf\xe9"])
def test_unusable_data_is_rejected(config, tmp_path, content):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    data = DataConfig(source="files", files=(str(bad),), seq_len=32, batch_size=2)
    with pytest.raises(DataError, match=r"bad\.txt|no "):
        train(dataclasses.replace(config, data=data))


@pytest.mark.slow
def test_without_heldout_text_there_is_no_evaluation(config):
    data = dataclasses.replace(config.data, heldout_fraction=0.0)
    result = train(dataclasses.replace(config, data=data, sample_tokens=0))
    assert result.heldout is None
    assert result.sample == ""
    assert steps_of(config) == [3, 6]
