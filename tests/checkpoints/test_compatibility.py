"""The format number of checkpoints: only readable formats are restored."""

import json
from pathlib import Path

import pytest

from megalodon_jax.checkpoints import RunCheckpoints, load_model
from megalodon_jax.checkpoints.compatibility import FORMAT, READABLE_FORMATS
from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import CheckpointError


def run_item(config: TrainConfig) -> Path:
    """The JSON file of the newest checkpoint's `run` item."""
    (path,) = Path(config.run_dir, "checkpoints", "6", "run").glob("metadata")
    return path


def change_format(config: TrainConfig, number: int | None) -> None:
    path = run_item(config)
    run = json.loads(path.read_text())
    del run["format"]
    path.write_text(json.dumps(run if number is None else {**run, "format": number}))


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
