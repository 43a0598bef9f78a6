"""Loader workers and their shared memory go with the process that started them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, multiprocessing, sys, time
from megalodon_jax.config import DataConfig
from megalodon_jax.data import load_tokenizer, make_loader
if __name__ == "__main__":
    config = DataConfig(
        files=(sys.argv[1],), document_separator="\\0", num_workers=2, seq_len=64, batch_size=4
    )
    loader = make_loader(config, load_tokenizer("bytes"), "train", repeat=True)
    for _ in range(4):
        next(loader)
    print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
    time.sleep(120)
"""
SHARED_MEMORY = Path("/dev/shm")


def _shared_names() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="shared memory is no folder here")
def test_nothing_is_left_five_seconds_after_sigkill(tmp_path: Path):
    (tmp_path / "text.txt").write_text("\0".join(f"document {i} " * 50 for i in range(40)))
    (tmp_path / "run.py").write_text(SCRIPT)
    before = _shared_names()
    main = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "text.txt")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert main.stdout is not None
    workers = json.loads(main.stdout.readline())
    created = _shared_names() - before
    assert len(workers) == 2
    # Semaphores, and batches that wait in shared memory.
    assert len(created) > 4
    os.kill(main.pid, signal.SIGKILL)
    main.wait()
    deadline = time.monotonic() + 5
    alive, left = workers, created
    while (alive or left) and time.monotonic() < deadline:
        time.sleep(0.1)
        alive = [pid for pid in workers if _is_running(pid)]
        left = created & _shared_names()
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    main.stdout.close()
    assert (alive, left) == ([], set())


def _is_running(pid: int) -> bool:
    try:
        # Orphans that nobody waits for stay as zombies in a container.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
