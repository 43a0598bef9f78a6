"""Results of a run: checkpoints, final state, metrics; processes and shared memory that remain."""

import collections
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from megalodon_jax.checkpoints import RunCheckpoints

LEFT_SECONDS = 5.0
# Metrics that measure time.
TIMES = re.compile(r"seconds_\w+|goodput|tokens_per_second|mfu")
SHARED_MEMORY = Path("/dev/shm")


def steps_of(run_dir: Path) -> list[int]:
    """Steps of the checkpoints with their final name; read without this package."""
    return sorted(int(p.name) for p in run_dir.glob("checkpoints/*") if p.name.isdigit())


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that have a manifest."""
    return [
        step for step in steps_of(run_dir)
        if (run_dir / "checkpoints" / str(step) / "manifest_0_of_1.txt").exists()
    ]  # fmt: skip


def final_state(run_dir: Path) -> dict[str, Any]:
    """Every array of the last checkpoint as bytes, and the loader's state."""
    with RunCheckpoints(run_dir, read_only=True) as checkpoints:
        step = checkpoints.steps()[-1]
        config, _ = checkpoints.read_run(step)
        restored = checkpoints.restore(step, config)
    leaves = jax.tree_util.tree_leaves_with_path(restored.state)
    arrays = {
        jax.tree_util.keystr(path): (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        for path, leaf in leaves
    }
    assert len(arrays) > 20
    return {**arrays, "step": step, "loader": restored.loader_state}


def metrics_of(run_dir: Path) -> dict[int, dict[str, float]]:
    """The metrics by step, without those of time; later lines replace earlier ones."""
    found: dict[int, dict[str, float]] = collections.defaultdict(dict)
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[record.pop("step")] |= record
    return {
        step: {name: value for name, value in record.items() if not TIMES.fullmatch(name)}
        for step, record in found.items()
    }


# Gives a command shared memory of its own, which nothing else on the machine writes to.
OWN_SHARED_MEMORY = (
    "unshare", "--mount", "--propagation", "private", "sh", "-c",
    'mount -t tmpfs -o size=1g tmpfs /dev/shm && exec "$@"', "sh",
)  # fmt: skip


@functools.cache
def can_have_own_shared_memory() -> bool:
    """Whether this user may mount file systems."""
    if not SHARED_MEMORY.is_dir() or shutil.which("unshare") is None:
        return False
    return subprocess.run([*OWN_SHARED_MEMORY, "true"], capture_output=True).returncode == 0


@contextlib.contextmanager
def open_shared_memory(pid: int) -> Iterator[int | None]:
    """The shared memory of a process that was started with `OWN_SHARED_MEMORY`.

    It remains readable after the end of the process; None if the process ended before it had it.
    """
    path = Path(f"/proc/{pid}/root{SHARED_MEMORY}")
    descriptor, deadline = None, time.monotonic() + LEFT_SECONDS
    while descriptor is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if path.stat().st_dev != SHARED_MEMORY.stat().st_dev:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def left_behind(session: int, shared_memory: int | None = None) -> list[str]:
    """Processes of a session, and shared memory, that are still there after five seconds."""
    deadline = time.monotonic() + LEFT_SECONDS
    while True:
        left = [f"process {pid}" for pid in processes_of(session)]
        left += os.listdir(shared_memory) if shared_memory is not None else []
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def processes_of(session: int) -> list[int]:
    """Living processes of a session; zombies that nobody waits for do not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            status, _, _, owner = path.read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and status not in "ZX":
                found.append(int(path.parent.name))
    return found
