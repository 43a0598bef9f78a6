"""Random SIGKILLs of a real run: every resume equals the uninterrupted run, bit for bit.

    python -m tests.faults.kills --count 100 --seed 0

A tiny run is killed at a random moment or at a chosen point (`faulty_run.POINTS`), also shortly
after SIGTERM and while its programs compile, and started again with `--auto_resume`. After each
kill: no process and no shared memory of it is left after five seconds, and the next start begins
at the newest checkpoint that was complete. After ten kills the run ends on its own, and another
one begins. At its end the parameters, the optimizer, the guard, the loader's state and all metrics
must equal those of a run that nothing interrupted.
"""

import argparse
import collections
import contextlib
import logging
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.faults.faulty_run import POINTS
from tests.faults.run_process import TOML, RunProcess, started_python
from tests.faults.run_results import (
    OWN_SHARED_MEMORY,
    can_have_own_shared_memory,
    complete_steps,
    final_state,
    left_behind,
    metrics_of,
    open_shared_memory,
    steps_of,
)

KILLS_PER_RUN = 10
END_SECONDS = 120.0
STEPS = 300
OPTIONS = (
    "--auto_resume", "--checkpoint_every", "7", "--keep_checkpoints", "2", "--eval_every", "20",
    "--eval_batches", "2",
)  # fmt: skip
# Kills from outside, in addition to the points inside the process.
OUTSIDE = ("random moment", "start-up", "compiling, no cache", "after SIGTERM")


class Planned(NamedTuple):
    """A kill: where, the how many-th time, and how many seconds later."""

    point: str
    occurrence: int
    seconds: float


@dataclass
class Report:
    """Number of kills, and faults that were found.

    Attributes:
      kills: number of kills at each point.
      missed: runs that ended before their kill.
      completed: runs that were compared with the uninterrupted one.
      starts: number of processes.
      faults: one text per fault.
    """

    kills: collections.Counter = field(default_factory=collections.Counter)
    missed: int = 0
    completed: int = 0
    starts: int = 0
    faults: list[str] = field(default_factory=list)


# Points that a start reaches once.
ONCE = (
    "before the lock", "lock taken", "setting aside", "restoring", "in config.json",
    "before TensorBoard", "compiling", "finishing",
)  # fmt: skip
# Longest time from a point to its kill.
SECONDS = {
    "writing arrays": 0.15, "compiling": 2.0, "compiling, no cache": 6.0, "start-up": 5.0,
    "random moment": 14.0, "after SIGTERM": 0.4, "in a step": 0.01,
}  # fmt: skip


class Deck:
    """Draws points at random, each as often as the others; moments from outside twice as often."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._left: list[str] = []

    def draw(self, run_dir: Path) -> Planned:
        """The next kill, among the points that this run can reach."""
        complete = complete_steps(run_dir)
        unreachable = set() if complete else {"restoring"}
        if len(steps_of(run_dir)) == len(complete):
            unreachable.add("setting aside")
        if not any(point not in unreachable for point in self._left):
            self._left += [*OUTSIDE, *OUTSIDE, *POINTS]
            self._left.remove("none")
            self._rng.shuffle(self._left)
        reachable = [point for point in self._left if point not in unreachable]
        # It is rarely possible, so it comes first.
        point = "setting aside" if "setting aside" in reachable else reachable[-1]
        self._left.remove(point)
        occurrence = 1 if point in ONCE else int(self._rng.integers(1, 5))
        return Planned(point, occurrence, float(self._rng.uniform(0.0, SECONDS.get(point, 0.0))))


class Harness:
    """Runs in a folder of their own, one of them without interruption.

    Args:
      folder: where everything is written.
      text_file: the runs' data.
      cache: directory of compiled programs.
      steps: number of updates of a run.
      seed: of the kills.
    """

    def __init__(
        self, folder: Path, text_file: Path, *, cache: str, steps: int = STEPS, seed: int = 0
    ) -> None:
        self.folder, self.cache, self.steps = folder, cache, steps
        self.rng = np.random.default_rng(seed)
        self.deck = Deck(self.rng)
        # Other programs create shared memory too; without this it is not looked at.
        self.prefix = OWN_SHARED_MEMORY if can_have_own_shared_memory() else ()
        self.report = Report()
        self.toml = folder / "run.toml"
        self.toml.write_text(TOML.format(steps=steps, text_file=text_file, lr=1e-2))
        self.uninterrupted = folder / "uninterrupted"
        with self.started(self.uninterrupted, Planned("none", 1, 0.0)) as run:
            code, _ = run.end(END_SECONDS)
            assert code == 0, run.output()

    @contextlib.contextmanager
    def started(self, run_dir: Path, planned: Planned) -> Iterator[RunProcess]:
        """One start of a run; worker processes load its data in every third start."""
        self.report.starts += 1
        point = planned.point if planned.point in POINTS else "none"
        cache = self.cache
        if planned.point in ("compiling, no cache", "in a compiled program"):
            cache = tempfile.mkdtemp(dir=self.folder)
        if planned.point == "in a compiled program":
            # The later starts find what this one leaves.
            self.cache = cache
        # Batches do not depend on it.
        workers = ("--data.num_workers", "1") if self.rng.integers(3) == 0 else ()
        arguments = [
            "-m", "tests.faults.faulty_run", "kill", point, str(planned.occurrence),
            str(planned.seconds), str(self.toml), "--run_dir", str(run_dir), *OPTIONS, *workers,
            "--compilation_cache", cache,
        ]  # fmt: skip
        with started_python(arguments, self.folder, "", prefix=self.prefix) as run:
            yield run

    def run(self, count: int, points: list[Planned] | None = None) -> Report:
        """Kills `count` times, at the given points if there are any."""
        planned = iter(points or ())
        number = 0
        while self.report.kills.total() < count and not self.report.faults:
            number += 1
            run_dir = self.folder / f"run_{number}"
            kills, has_ended = 0, False
            while not has_ended:
                is_last = kills == KILLS_PER_RUN or self.report.kills.total() == count
                chosen = next(planned, None) or self.deck.draw(run_dir)
                killed = self.start_and_kill(
                    run_dir, Planned("none", 1, 0.0) if is_last else chosen
                )
                kills += killed
                has_ended = not killed
            self.compare(run_dir)
            shutil.rmtree(run_dir)
        return self.report

    def start_and_kill(self, run_dir: Path, planned: Planned) -> bool:
        """One start and its kill; False if the run came to its end or a fault was found."""
        complete = complete_steps(run_dir)
        newest = complete[-1] if complete else 0
        with (
            self.started(run_dir, planned) as run,
            open_shared_memory(run.process.pid) if self.prefix else nullcontext() as shared,
        ):
            try:
                kill_from_outside(run, planned)
                code, _ = run.end(END_SECONDS)
            except AssertionError as error:
                self.report.faults.append(f"{planned}: {error}")
                return False
            left = left_behind(run.process.pid, shared)
        output = run.output()
        where = f"{planned} of {run_dir.name}, newest complete checkpoint {newest}"
        match = re.search(r"parameters on .*?(?:, resumed at step (\d+))?\n", output)
        if match is not None and int(match[1] or 0) != newest:
            self.report.faults.append(f"{where}: resumed at step {match[1]}:\n{output}")
        if "persistent compilation cache" in output:
            self.report.faults.append(f"{where}: a program cannot be read:\n{output}")
        if left:
            self.report.faults.append(f"{where}: left behind: {left}")
        if code == -signal.SIGKILL:
            self.report.kills[planned.point] += 1
            return not self.report.faults
        if code == 128 + signal.SIGTERM and planned.point == "after SIGTERM":
            self.report.missed += 1
            return self.start_and_kill(run_dir, self.deck.draw(run_dir))
        if code != 0:
            self.report.faults.append(f"{where}: ended with exit code {code}:\n{output}")
        self.report.missed += planned.point != "none"
        return False

    def compare(self, run_dir: Path) -> None:
        """Compares a run that has ended with the uninterrupted one."""
        if self.report.faults:
            return
        self.report.completed += 1
        for name, read in (("final state", final_state), ("metrics", metrics_of)):
            if read(run_dir) != read(self.uninterrupted):
                self.report.faults.append(f"{run_dir.name}: another {name}")


def kill_from_outside(run: RunProcess, planned: Planned) -> None:
    """Sends SIGKILL to the process at its moment, unless the point is inside of it."""
    if planned.point not in OUTSIDE:
        return
    with contextlib.suppress(AssertionError):  # it has ended before
        if planned.point == "compiling, no cache":
            run.wait_for("parameters on")
        elif planned.point == "after SIGTERM":
            run.wait_for("first step")
            time.sleep(planned.occurrence * 0.5)
            run.send(signal.SIGTERM)
    time.sleep(planned.seconds)
    run.process.kill()


def main() -> int:
    """Prints the counts; the exit code is 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="number of kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Orbax warns of every directory that is opened to be read.
    logging.getLogger("absl").setLevel(logging.ERROR)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text_file = folder / "corpus.txt"
        text_file.write_text("\0".join(f"document {i}: " + "ab c" * (50 * i) for i in range(1, 41)))
        harness = Harness(folder, text_file, cache=f"{folder}/compiled", seed=options.seed)
        report = harness.run(options.count)
    kills = report.kills
    for point, count in sorted(kills.items()):
        print(f"{count:4d}  {point}")
    print(
        f"{kills.total()} kills at {len(kills)} points, {report.starts} starts, {report.missed} "
        f"ended before their kill, {report.completed} runs compared with the uninterrupted one, "
        f"{time.monotonic() - started:.0f} s: {len(report.faults)} faults"
    )
    for fault in report.faults:
        print(f"FAULT {fault}")
    return int(bool(report.faults))


if __name__ == "__main__":
    sys.exit(main())
