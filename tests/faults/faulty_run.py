"""Runs `train.py` in this process, and a fault at a chosen point of it.

    python -m tests.faults.faulty_run FAULT POINT OCCURRENCE SECONDS CONFIG.toml --run_dir RUN ...

The fault comes `SECONDS` after the point has been reached for the `OCCURRENCE`-th time; with the
point "none" the run is unchanged. `kill` is SIGKILL: at a point in the middle of a write half of
the file is there. The other faults (`FAULTS`) concern the file system of the run directory, which
must be one of its own.
"""

import contextlib
import functools
import itertools
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# JAX has no public name for the files of its compilation cache.
from jax._src import lru_cache

from megalodon_jax.checkpoints import directory, manager
from megalodon_jax.checkpoints.lock import RunLock
from megalodon_jax.data import pipeline
from megalodon_jax.training import loop, metrics, run_context

ROOT = Path(__file__).resolve().parents[2]


def kill(run_dir: Path) -> None:
    """Ends this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill(run_dir: Path) -> None:
    """Uses up the space of the file system."""
    block = bytes(4096)
    with contextlib.suppress(OSError), (run_dir.parent / "ballast").open("wb") as file:
        while True:
            file.write(block)
            file.flush()


def remove(run_dir: Path) -> None:
    """Removes the run directory."""
    # Files that the run creates meanwhile make the first attempt fail.
    while run_dir.exists():
        shutil.rmtree(run_dir, ignore_errors=True)


def make_immutable(run_dir: Path) -> None:
    """Makes the run directory and all in it immutable, also for root."""
    run_dir.mkdir(exist_ok=True)
    subprocess.run(["chattr", "-R", "-f", "+i", str(run_dir)], check=False)


def make_read_only(run_dir: Path) -> None:
    """Turns the file system read-only, as Linux does after an error of the disk."""
    subprocess.run(["mount", "-o", "remount,abort", str(run_dir.parent)], check=True)


FAULTS = {
    "kill": kill, "full": fill, "removed": remove, "immutable": make_immutable,
    "read-only": make_read_only,
}  # fmt: skip


class FaultAt:
    """Causes a fault at the `occurrence`-th call, after some seconds."""

    def __init__(self, name: str, run_dir: Path, *, occurrence: int, seconds: float) -> None:
        self.is_kill = name == "kill"
        self._fault = functools.partial(FAULTS[name], run_dir)
        self._occurrence, self._seconds = occurrence, seconds
        self._calls = itertools.count(1)
        self._next = 1

    def is_due(self) -> bool:
        """Whether the next call causes the fault."""
        return self._next == self._occurrence

    def __call__(self) -> None:
        self._next += 1
        if next(self._calls) != self._occurrence:
            return
        if not self._seconds:
            self._cause()
            return
        timer = threading.Timer(self._seconds, self._cause)
        timer.daemon = True
        timer.start()

    def _cause(self) -> None:
        self._fault()
        os.write(1, b"FAULT\n")


def before(owner: Any, name: str, fault: FaultAt) -> None:
    """Causes the fault before each call of a function."""
    function = getattr(owner, name)

    def call(*arguments: Any, **settings: Any) -> Any:
        fault()
        return function(*arguments, **settings)

    setattr(owner, name, call)


def after(owner: Any, name: str, fault: FaultAt) -> None:
    """Causes the fault after each call of a function."""
    function = getattr(owner, name)

    def call(*arguments: Any, **settings: Any) -> Any:
        result = function(*arguments, **settings)
        fault()
        return result

    setattr(owner, name, call)


def before_commit(fault: FaultAt) -> None:
    """All arrays are written; the checkpoint has not got its final name."""
    check = manager.RunCheckpoints._check_lock

    def call(self: Any) -> None:
        # Orbax calls it from a thread of its own, this package from those with these names.
        ours = ("MainThread", "finish_save", "remove_checkpoints")
        if threading.current_thread().name not in ours:
            fault()
        check(self)

    manager.RunCheckpoints._check_lock = call


def in_replace(word: str) -> Callable[[FaultAt], None]:
    """The temporary file is written; it has not got the name with this word."""

    def install(fault: FaultAt) -> None:
        replace = os.replace

        def call(source: Any, target: Any) -> None:
            if word in Path(target).name:
                fault()
            replace(source, target)

        os.replace = call

    return install


def in_removal(fault: FaultAt) -> None:
    """Half of a checkpoint's files are removed."""
    remove_tree = directory.LocalDirectory.remove_tree

    def remove_half(self: directory.LocalDirectory, name: str) -> None:
        files = [path for path in (self.path / name).rglob("*") if path.is_file()]
        for path in files[::2]:
            path.unlink()
        fault()
        remove_tree(self, name)

    directory.LocalDirectory.remove_tree = remove_half


def in_metrics_line(fault: FaultAt) -> None:
    """Half of a line is in `metrics.jsonl`."""
    write = metrics.RunLog.write

    def call(self: Any, step: int, values: Any) -> None:
        if fault.is_kill and fault.is_due():
            print(f'{{"step": {step}, "loss": 3.', end="", file=self._lines, flush=True)
        fault()
        write(self, step, values)

    metrics.RunLog.write = call


def in_config(fault: FaultAt) -> None:
    """Half of `config.json` is written."""
    write_text = Path.write_text

    def call(self: Path, text: str, *arguments: Any, **settings: Any) -> int:
        if self.name == "config.json":
            if fault.is_kill:
                write_text(self, text[: len(text) // 2])
            fault()
        return write_text(self, text, *arguments, **settings)

    run_context.Path.write_text = call


def in_compiled_program(fault: FaultAt) -> None:
    """Half of a compiled program is in the cache."""

    put = lru_cache.LRUCache.put

    def put_half(self: Any, key: str, value: bytes) -> None:
        if fault.is_kill and fault.is_due():
            (self.path / f"{key}-cache").write_bytes(value[: len(value) // 2])
        fault()
        put(self, key, value)

    lru_cache.LRUCache.put = put_half


def in_compilation(fault: FaultAt) -> None:
    """The first step begins to compile."""
    make = loop.make_train_step

    def make_step(*arguments: Any, **options: Any) -> Any:
        step = make(*arguments, **options)

        def call(*values: Any) -> Any:
            fault()
            return step(*values)

        return call

    loop.make_train_step = make_step


POINTS: dict[str, Callable[[FaultAt], None]] = {
    "none": lambda fault: None,
    "before the lock": lambda fault: before(RunLock, "_acquire", fault),
    "lock taken": lambda fault: after(RunLock, "_acquire", fault),
    "setting aside": lambda fault: after(directory.LocalDirectory, "move", fault),
    "restoring": lambda fault: after(manager.RunCheckpoints, "restore", fault),
    "in config.json": in_config,
    "compiling": in_compilation,
    "in a compiled program": in_compiled_program,
    "in a step": lambda fault: before(loop._Run, "_train_step", fault),
    "before a save": lambda fault: before(manager.RunCheckpoints, "save", fault),
    "writing arrays": lambda fault: after(manager.RunCheckpoints, "save", fault),
    "before the commit": before_commit,
    "before the manifest": lambda fault: before(manager, "write_manifest", fault),
    "in the manifest": in_replace("manifest_"),
    "after the manifest": lambda fault: after(manager, "write_manifest", fault),
    "before a deletion": lambda fault: before(manager, "remove_checkpoint", fault),
    "deletion, manifest gone": lambda fault: before(directory.LocalDirectory, "remove_tree", fault),
    "in a deletion": in_removal,
    "evaluating": lambda fault: before(loop._Run, "_evaluate_batch", fault),
    "held-out losses": in_replace("heldout.json"),
    "run time": in_replace("run_time.json"),
    "before TensorBoard": lambda fault: before(metrics.RunLog, "__init__", fault),
    "in a metrics line": in_metrics_line,
    "finishing": lambda fault: before(loop._Run, "finish", fault),
}


def main() -> None:
    """Installs the point and runs `train.py`."""
    name, point, occurrence, seconds, *arguments = sys.argv[1:]
    run_dir = Path(arguments[arguments.index("--run_dir") + 1])
    # A run of tiny batches does not need a million tokens in advance.
    pipeline.PREFETCHED_TOKENS = 1 << 10
    fault = FaultAt(name, run_dir, occurrence=int(occurrence), seconds=float(seconds))
    POINTS[point](fault)
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
