"""Log files and the progress display."""

import json

import pytest

from megalodon_jax.errors import ConfigError
from megalodon_jax.training.metrics import ProgressDisplay, RunLog


def test_log_lines_are_strict_json_and_append(tmp_path):
    for first_step in (0, 2):
        log = RunLog(tmp_path, config={}, first_step=first_step)
        log.write(first_step + 1, {"loss": 1.5, "mfu": None, "grad_norm": float("nan")})
        log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert first == {"step": 1, "loss": 1.5, "grad_norm": "nan"}
    assert second["step"] == 3
    assert list((tmp_path / "tensorboard").iterdir())


def test_missing_wandb_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        RunLog(tmp_path, config={}, wandb_project="p")


def test_progress_without_a_terminal_is_plain_lines(capsys):
    with ProgressDisplay(first_step=0, steps=10) as display:
        display.advance(1)
        display.report(5, "loss 1.0000")
        display.message("[note]")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 5/10  loss 1.0000  left 0:00:")
    assert lines[1] == "[note]"
