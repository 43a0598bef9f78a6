"""The short form of `tests.faults.kills`: a real run that is killed at three points of it.

The points leave the most behind: a checkpoint without manifest, half of a deletion, and a process
that compiles.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.faults import run_results
from tests.faults.faulty_run import POINTS
from tests.faults.kills import OUTSIDE, Deck, Harness, Planned
from tests.faults.run_process import ROOT
from tests.faults.run_results import metrics_of, processes_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


@pytest.mark.slow
def test_three_kills(tmp_path, text_file, compilation_cache_dir):
    harness = Harness(tmp_path, text_file, cache=compilation_cache_dir, steps=30)
    points = [
        Planned("before the manifest", 2, 0.0),
        Planned("compiling", 1, 0.01),
        Planned("in a deletion", 1, 0.0),
    ]
    report = harness.run(3, points)
    assert report.faults == []
    assert set(report.kills) == {planned.point for planned in points}
    assert report.completed == 1
    # The compared files exist.
    assert set(metrics_of(harness.uninterrupted)) == set(range(1, 31))
    assert "heldout_loss" in metrics_of(harness.uninterrupted)[20]


def test_every_point_is_drawn(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "checkpoints" / "14").mkdir()
    (tmp_path / "checkpoints" / "7" / "manifest_0_of_1.txt").touch()
    deck = Deck(np.random.default_rng(0))
    drawn = [deck.draw(tmp_path).point for _ in range(len(POINTS) - 1 + 2 * len(OUTSIDE))]
    assert set(drawn) == {*POINTS, *OUTSIDE} - {"none"}
    assert drawn.count("random moment") == 2


@pytest.mark.slow
def test_every_point_is_installed():
    install = """
from pathlib import Path
from tests.faults.faulty_run import POINTS, FaultAt
for point in POINTS.values():
    point(FaultAt("kill", Path("run"), occurrence=1, seconds=0.0))
print("installed", len(POINTS))
"""
    # A process of its own: the points change this package.
    done = subprocess.run(
        [sys.executable, "-c", install], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == f"installed {len(POINTS)}\n", done.stderr


def test_processes_and_metrics_are_found(tmp_path):
    assert os.getpid() in processes_of(os.getsid(0))
    lines = '{"step": 1, "loss": 2.0, "goodput": 0.1}\n{"step": 1, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert metrics_of(tmp_path) == {1: {"loss": 1.0}}
    assert run_results.steps_of(tmp_path) == []
