"""Scratch directories go with their process."""

import os
import subprocess
import sys
from pathlib import Path

from megalodon_jax.storage.scratch import scratch_directory

ROOT = Path(__file__).resolve().parents[2]
OWNER = """
import sys
from megalodon_jax.storage.scratch import scratch_directory
with scratch_directory() as directory:
    print(directory, flush=True)
    sys.stdin.read()
"""


def test_that_of_a_killed_process_is_removed_and_that_of_a_living_one_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        other = Path(process.stdout.readline().strip())
        with scratch_directory() as own:
            assert own.is_dir()
            assert own.parent == other.parent == tmp_path
            assert other.is_dir()
        assert not own.exists()
        process.kill()
        process.wait()
    assert other.is_dir()
    (tmp_path / "megalodon_scratch_of_nobody").mkdir()
    with scratch_directory():
        assert not other.exists()
    assert os.listdir(tmp_path) == ["megalodon_scratch_of_nobody"]
