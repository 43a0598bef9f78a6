"""Log files and the progress display."""

import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

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


@pytest.mark.parametrize(
    ("torn", "kept"),
    [('{"step": 2, "lo', []), ('{"step": 2, "loss": 2.0}', [2]), ('{"step": 2}\n{"st', [2])],
)
def test_a_torn_last_line_does_not_swallow_the_next_record(tmp_path, torn, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    log = RunLog(tmp_path, config={}, first_step=1)
    log.write(3, {"loss": 1.5})
    log.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, *kept, 3]


def points_of(folder) -> dict[int, float]:
    """The points that TensorBoard shows: a start event drops those from its step on."""
    points: dict[int, float] = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.session_log.status == event.session_log.START:
                points = {step: value for step, value in points.items() if step < event.step}
            for value in event.summary.value:
                points[event.step] = value.simple_value
    return points


def test_tensorboard_keeps_the_last_point_before_a_resume(tmp_path):
    for first_step, last in ((0, 5), (3, 4)):
        log = RunLog(tmp_path, config={}, first_step=first_step)
        for step in range(first_step + 1, last + 1):
            log.write(step, {"loss": 10.0 * first_step + step})
        log.close()
    assert points_of(tmp_path / "tensorboard") == {1: 1.0, 2: 2.0, 3: 3.0, 4: 34.0}


def test_changed_settings_are_a_line(tmp_path):
    log = RunLog(tmp_path, config={}, first_step=3)
    log.write_changes(3, {"optim.lr": (1e-2, 5e-3), "optim.clip_norm": (1.0, float("inf"))})
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    changed = {"optim.lr": [1e-2, 5e-3], "optim.clip_norm": [1.0, "inf"]}
    assert line == {"step": 3, "changed_settings": changed}


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
