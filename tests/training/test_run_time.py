"""Seconds by phase: every moment counted once, summed over restarts, redone work is lost."""

import json

import pytest

from megalodon_jax.training import run_time
from megalodon_jax.training.run_time import FILE_NAME, PHASES, RunTime


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_time.time, "monotonic", clock.monotonic)
    return clock


def seconds(time: RunTime) -> dict[str, float]:
    return {name: time.metrics()[f"seconds_{name}"] for name in PHASES}


def test_every_moment_belongs_to_one_phase(clock):
    time = RunTime(None, started=clock.now - 2.0)
    clock.wait(3.0)
    time.enter("steps")
    clock.wait(10.0)
    time.move(4.0, to="data")
    with time.phase("evaluation"):
        clock.wait(5.0)
        with time.phase("compilation"):
            clock.wait(7.0)
        clock.wait(1.0)
    clock.wait(2.0)
    found = seconds(time)
    assert found == {
        "start_up": 5.0, "compilation": 7.0, "steps": 8.0, "data": 4.0, "evaluation": 6.0,
        "saving": 0.0, "lost": 0.0,
    }  # fmt: skip
    assert sum(found.values()) == clock.now - 98.0
    assert time.metrics()["goodput"] == 8.0 / 30.0
    assert "goodput 26.7% of 30.0 s in 1 start: start-up 5.0 s" in time.summary()


def run_and_be_killed(clock: Clock, run_dir, *, resumed: int, saved: int, reported: int) -> RunTime:
    """One start of a run: a second per update, and the last two updates are not reported."""
    time = RunTime(run_dir, started=clock.now)
    time.resume_at(resumed)
    clock.wait(3.0)
    time.enter("steps")
    clock.wait(saved - resumed)
    with time.phase("saving"):
        clock.wait(0.5)
    time.mark(saved)
    clock.wait(reported - saved)
    time.write(reported)
    clock.wait(2.0)
    return time


def test_work_done_again_is_lost_and_sums_survive_kills(clock, tmp_path):
    run_and_be_killed(clock, tmp_path, resumed=0, saved=10, reported=16)
    clock.wait(1000.0)
    run_and_be_killed(clock, tmp_path, resumed=10, saved=20, reported=24)
    last = RunTime(tmp_path, started=clock.now)
    last.resume_at(20)
    assert seconds(last) == {
        "start_up": 6.0, "compilation": 0.0, "steps": 20.0, "data": 0.0, "evaluation": 0.0,
        "saving": 1.0, "lost": 6.0 + 4.0,
    }  # fmt: skip
    assert "in 3 starts" in last.summary()


def test_a_start_without_checkpoint_loses_everything_before(clock, tmp_path):
    time = RunTime(tmp_path, started=clock.now)
    time.enter("steps")
    clock.wait(7.0)
    time.write(5)
    again = RunTime(tmp_path, started=clock.now)
    again.resume_at(0)
    assert (seconds(again)["lost"], seconds(again)["steps"]) == (7.0, 0.0)


def test_without_a_mark_updates_are_taken_as_equally_long(clock, tmp_path):
    run_and_be_killed(clock, tmp_path, resumed=0, saved=10, reported=16)
    again = RunTime(tmp_path, started=clock.now)
    again.resume_at(4)
    assert (seconds(again)["steps"], seconds(again)["lost"]) == (4.0, 12.0)


@pytest.mark.parametrize("content", ["", "[1]", '{"seconds": {}}'])
def test_an_unreadable_file_is_reported(tmp_path, content, capsys):
    (tmp_path / FILE_NAME).write_text(content)
    time = RunTime(tmp_path, started=0.0)
    assert str(tmp_path / FILE_NAME) in capsys.readouterr().err
    time.write(1)
    assert json.loads((tmp_path / FILE_NAME).read_text())["starts"] == 1
