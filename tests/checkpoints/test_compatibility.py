"""Checkpoints of other versions: format numbers, and checkpoints without manifest."""

import dataclasses
import json
from pathlib import Path

import pytest

from megalodon_jax.checkpoints import RunCheckpoints, load_model
from megalodon_jax.checkpoints.compatibility import FORMAT, READABLE_FORMATS
from megalodon_jax.checkpoints.directory import LocalDirectory
from megalodon_jax.checkpoints.manifest import write_manifest
from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import CheckpointError, IncompleteCheckpointError
from megalodon_jax.training.loop import train


def run_item(config: TrainConfig) -> Path:
    """The JSON file of the newest checkpoint's `run` item."""
    (path,) = Path(config.run_dir, "checkpoints", "6", "run").glob("metadata")
    return path


def change_format(config: TrainConfig, number: int | None) -> None:
    path = run_item(config)
    run = json.loads(path.read_text())
    del run["format"]
    path.write_text(json.dumps(run if number is None else {**run, "format": number}))
    write_manifest(LocalDirectory(path.parents[1]), 6)


def remove_manifests(config: TrainConfig) -> None:
    """Makes the checkpoints those of a version without manifests."""
    for path in Path(config.run_dir, "checkpoints").glob("*/manifest_*"):
        path.unlink()


def test_this_version_writes_a_format_that_it_reads(trained_run):
    assert json.loads(run_item(trained_run).read_text())["format"] == FORMAT
    assert FORMAT in READABLE_FORMATS


@pytest.mark.parametrize(
    ("number", "found"), [(None, r"has no format number"), (FORMAT + 1, f"has format {FORMAT + 1}")]
)
def test_other_formats_are_rejected_by_name(finished, number, found):
    change_format(finished, number)
    with pytest.raises(CheckpointError, match=f"checkpoints/6 {found}.*reads format {FORMAT}"):
        load_model(finished.run_dir, step=6)
    with (
        RunCheckpoints(finished.run_dir, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=found),
    ):
        checkpoints.restore(6, finished)
    # Without a step the newest readable checkpoint is loaded.
    assert load_model(finished.run_dir).config == load_model(finished.run_dir, step=3).config


def test_without_manifest_a_checkpoint_loads_only_unverified(finished, capsys):
    remove_manifests(finished)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        load_model(finished.run_dir)
    errors = capsys.readouterr().err
    assert errors.count("incomplete checkpoint, trying the previous one") == 2
    assert "--allow_unverified" in errors
    with pytest.raises(IncompleteCheckpointError, match="checkpoints/6 is incomplete"):
        load_model(finished.run_dir, step=6)
    loaded = load_model(finished.run_dir, allow_unverified=True)
    assert loaded.config.model == finished.model
    assert capsys.readouterr().err.count("has no manifest, so that damage") == 1


@pytest.mark.slow
def test_a_run_without_manifests_resumes_and_gets_them(finished, capsys):
    remove_manifests(finished)
    resumed = dataclasses.replace(finished, resume=True, steps=9, allow_unverified=True)
    assert train(resumed).step == 9
    with RunCheckpoints(finished.run_dir, read_only=True) as checkpoints:
        assert checkpoints.steps() == [3, 6, 9]
        checkpoints.verify(9)


@pytest.mark.slow
def test_a_checkpoint_whose_manifest_was_not_written_is_passed_over(finished, capsys):
    """As after a kill between Orbax's commit and the manifest."""
    next(Path(finished.run_dir, "checkpoints", "6").glob("manifest_*")).unlink()
    train(dataclasses.replace(finished, resume=True))
    output = capsys.readouterr()
    assert "incomplete checkpoint, trying the previous one" in output.err
    assert "checkpoint of step 3 verified: " in output.out
    names = {path.name for path in Path(finished.run_dir, "checkpoints").iterdir()}
    assert names == {"3", "6", "incomplete_6", "heldout.json"}
