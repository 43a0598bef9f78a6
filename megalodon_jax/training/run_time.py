"""Where a run's time goes, summed over its restarts: the goodput and what reduces it."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

Phase = Literal[
    "start_up", "compilation", "steps", "data", "evaluation", "saving", "lost"
]  # fmt: skip
PHASES: tuple[Phase, ...] = get_args(Phase)
FILE_NAME = "run_time.json"
# Checkpoints whose time is remembered; a run keeps fewer.
_MAX_MARKS = 1000


class RunTime:
    """Seconds of every phase; each moment belongs to one phase.

    `steps` is the time of updates that remain. A resumed run moves the time of the updates that it
    does again from `steps` to `lost`. The sums are read from and written to `run_time.json` in the
    run directory, at every report and save, so that a kill loses one report at most.

    Args:
      run_dir: the run's directory; None: the sums are not persisted (processes other than 0).
      started: `time.monotonic()` at the start of the process's run.
      devices: text about them, for the file.
    """

    def __init__(self, run_dir: str | Path | None, *, started: float, devices: str = "") -> None:
        self._path = None if run_dir is None else Path(run_dir) / FILE_NAME
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._marks: dict[int, float] = {}
        self._step = 0
        self._starts = 0
        self._devices = devices
        self._phase: Phase = "start_up"
        self._since = started
        if self._path is not None and self._path.exists():
            self._load(self._path)
        self._starts += 1

    def resume_at(self, step: int) -> None:
        """Declares the updates of earlier starts after `step` lost.

        Without the mark of this checkpoint every update is taken to have lasted equally long.
        """
        total = self._seconds["steps"]
        share = min(1.0, step / self._step) if self._step else 1.0
        kept = min(total, self._marks.get(step, total * share))
        self._seconds["steps"] = kept
        self._seconds["lost"] += total - kept
        self._marks = {at: mark for at, mark in self._marks.items() if at <= step}
        self._step = step

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """The time inside belongs to this phase."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def enter(self, name: Phase) -> None:
        """From now on the time belongs to this phase."""
        self._switch(name)

    def move(self, seconds: float, *, to: Phase) -> None:
        """Moves seconds that were counted in the current phase."""
        self._switch(self._phase)
        self._seconds[self._phase] -= seconds
        self._seconds[to] += seconds

    def mark(self, step: int) -> None:
        """Remembers the time of the updates up to a checkpoint."""
        self._switch(self._phase)
        self._marks[step] = self._seconds["steps"]
        for at in sorted(self._marks)[:-_MAX_MARKS]:
            del self._marks[at]
        self.write(step)

    def write(self, step: int) -> None:
        """Persists the sums after `step` updates."""
        self._switch(self._phase)
        self._step = step
        if self._path is None:
            return
        content = {
            "step": step,
            "starts": self._starts,
            "devices": self._devices,
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
            "steps_seconds_at_checkpoint": {str(at): self._marks[at] for at in self._marks},
        }
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(unfinished, self._path)

    def metrics(self) -> dict[str, float]:
        """Seconds of every phase, and the goodput: the fraction of all time in `steps`."""
        self._switch(self._phase)
        total = sum(self._seconds.values())
        metrics = {f"seconds_{name}": value for name, value in self._seconds.items()}
        return {"goodput": self._seconds["steps"] / total if total else 0.0, **metrics}

    def summary(self) -> str:
        """One line: goodput, total time and seconds by phase."""
        metrics = self.metrics()
        total = sum(self._seconds.values())
        parts = [
            f"{name.replace('_', '-')} {value:,.1f} s" for name, value in self._seconds.items()
        ]
        starts = "1 start" if self._starts == 1 else f"{self._starts} starts"
        return f"goodput {metrics['goodput']:.1%} of {total:,.1f} s in {starts}: {', '.join(parts)}"

    def _switch(self, name: Phase) -> Phase:
        now = time.monotonic()
        before = self._phase
        self._seconds[before] += now - self._since
        self._phase, self._since = name, now
        return before

    def _load(self, path: Path) -> None:
        try:
            content: Any = json.loads(path.read_text())
            seconds = {name: float(content["seconds"][name]) for name in PHASES}
            marks = {
                int(step): float(mark)
                for step, mark in content["steps_seconds_at_checkpoint"].items()
            }
            self._step, self._starts = int(content["step"]), int(content["starts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"run time of earlier starts is unknown: {path}: {error!r}", file=sys.stderr)
            return
        self._seconds, self._marks = seconds, marks
