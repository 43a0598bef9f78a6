"""A file system that fails under a run: full, read-only, immutable, or the run directory removed.

    python -m tests.faults.storage

A tiny run lies on an ext4 file system of its own, in a file (the command needs root). At each kind
of write the fault comes just before it: full is a real "no space left on device", read-only what
Linux does after an error of the disk. Required each time: the process ends by itself within ten
seconds, with an exit code other than 0 and one message without traceback; the checkpoints before
are intact; after the repair the run resumes and equals the uninterrupted one bit for bit.
"""

import argparse
import contextlib
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megalodon_jax.checkpoints import verify_run
from tests.faults.run_process import TOML, RunProcess, started_python
from tests.faults.run_results import complete_steps, final_state, left_behind, metrics_of

STEPS = 60
MOST_SECONDS = 10.0
START_SECONDS = 120.0
MOUNT_SECONDS = 120.0
OPTIONS = (
    "--auto_resume", "--checkpoint_every", "7", "--keep_checkpoints", "2", "--eval_every", "20",
    "--eval_batches", "2",
)  # fmt: skip
FAULTS = ("full", "read-only", "immutable", "removed")
# Points before a write, and which one of several.
WRITES = (
    ("before the lock", 1), ("lock taken", 1), ("in config.json", 1), ("before TensorBoard", 1),
    ("in a step", 3), ("in a metrics line", 5), ("run time", 2), ("before a save", 1),
    ("before a save", 3), ("writing arrays", 3), ("before the commit", 1), ("before the commit", 3),
    ("before the manifest", 1), ("before the manifest", 3), ("in the manifest", 3),
    ("after the manifest", 3), ("before a deletion", 1), ("in a deletion", 1),
    ("held-out losses", 1), ("evaluating", 2), ("finishing", 1),
)  # fmt: skip


class Case(NamedTuple):
    """A fault, the point before which it comes, and the how many-th time."""

    fault: str
    point: str
    occurrence: int

    def __str__(self) -> str:
        return f"{self.fault}, {self.point} ({self.occurrence})"


class Result(NamedTuple):
    """The result of one case.

    Attributes:
      seconds: time from the fault to the end of the process.
      message: the last line of its output.
      faults: what must not be.
    """

    seconds: float
    message: str
    faults: list[str]


def all_cases() -> list[Case]:
    """Every fault at every kind of write."""
    return [Case(fault, point, number) for fault in FAULTS for point, number in WRITES]


class Volume:
    """An ext4 file system in a file, mounted at `path`."""

    def __init__(self, folder: Path, *, megabytes: int = 24) -> None:
        self._folder, self.path = folder, folder / "volume"
        self._image = folder / "image_0"
        self._number, self._megabytes = 0, megabytes
        self.path.mkdir()

    def format(self) -> None:
        """Mounts an empty file system."""
        self.unmount()
        self._image.unlink(missing_ok=True)
        # A mount namespace of another program may still use the last one.
        self._number += 1
        self._image = self._folder / f"image_{self._number}"
        with self._image.open("wb") as file:
            file.truncate(self._megabytes << 20)
        # No blocks reserved for root.
        command = ["mkfs.ext4", "-q", "-F", "-m", "0", str(self._image)]
        subprocess.run(command, check=True, capture_output=True)
        self._mount()

    def repair(self) -> None:
        """Undoes every fault."""
        self.unmount()
        self._mount()
        subprocess.run(["chattr", "-R", "-f", "-i", str(self.path)], check=False)

    def unmount(self) -> None:
        """Unmounts the file system if it is mounted."""
        if self.path.is_mount():
            subprocess.run(["umount", str(self.path)], check=True)

    def _mount(self) -> None:
        command = ["mount", "-o", "loop", str(self._image), str(self.path)]
        deadline = time.monotonic() + MOUNT_SECONDS
        while True:
            try:
                subprocess.run(command, check=True, capture_output=True)
                (self.path / "ballast").touch()
                (self.path / "ballast").unlink()
                return
            # In another mount namespace the file system still is in its failed state.
            except (OSError, subprocess.CalledProcessError):
                self.unmount()
                if time.monotonic() > deadline or self._number == 1:
                    raise
                time.sleep(1.0)


@contextlib.contextmanager
def mounted_volume(folder: Path) -> Iterator[Volume]:
    """A new file system.

    Raises:
      OSError, subprocess.CalledProcessError: this user or this machine cannot mount one.
    """
    volume = Volume(folder)
    try:
        volume.format()
        yield volume
    finally:
        volume.unmount()


class Harness:
    """Runs on a volume, and one without fault beside it."""

    def __init__(self, folder: Path, volume: Volume, text_file: Path, *, cache: str) -> None:
        self.folder, self.volume, self.cache = folder, volume, cache
        self.toml = folder / "run.toml"
        self.toml.write_text(TOML.format(steps=STEPS, text_file=text_file, lr=1e-2))
        self.uninterrupted = folder / "uninterrupted"
        with self.started(self.uninterrupted, Case("kill", "none", 1)) as run:
            code, _ = run.end(START_SECONDS)
            assert code == 0, run.output()

    @contextlib.contextmanager
    def started(self, run_dir: Path, case: Case) -> Iterator[RunProcess]:
        """One start of a run."""
        arguments = [
            "-m", "tests.faults.faulty_run", case.fault, case.point, str(case.occurrence), "0",
            str(self.toml), "--run_dir", str(run_dir), *OPTIONS, "--compilation_cache", self.cache,
        ]  # fmt: skip
        with started_python(arguments, self.folder, "") as run:
            yield run

    def run(self, case: Case) -> Result:
        """Runs one case on an empty file system."""
        self.volume.format()
        run_dir = self.volume.path / "run"
        with self.started(run_dir, case) as run:
            seconds, output, found = self.wait_for_end(run)
        if left := left_behind(run.process.pid):
            found.append(f"left behind: {left}")
        if self.has_completed(run_dir, case, output):
            return Result(seconds, "the run had written all that it needed", found)
        lines = [line for line in output.splitlines() if line.strip()]
        message = lines[-1] if lines else ""
        if not message.startswith("megalodon: error: ") or len(message) > 900:
            found.append(f"no clear message: {output}")
        elif "Traceback" in output:
            found.append(f"a traceback: {output}")
        found += self.resume(run_dir, case)
        return Result(seconds, message.removeprefix("megalodon: error: "), found)

    def has_completed(self, run_dir: Path, case: Case, output: str) -> bool:
        """Whether the last lines fitted into blocks that the files had already."""
        return (
            case.fault == "full"
            and f"step {STEPS}; checkpoints and logs are in" in output
            and "Traceback" not in output
            and final_state(run_dir) == final_state(self.uninterrupted)
            and metrics_of(run_dir) == metrics_of(self.uninterrupted)
        )

    def wait_for_end(self, run: RunProcess) -> tuple[float, str, list[str]]:
        """Seconds from the fault to the end, the output, and what was wrong."""
        with contextlib.suppress(AssertionError):  # it ended before it was seen
            run.wait_for("FAULT")
        started = time.monotonic()
        try:
            code, _ = run.end(MOST_SECONDS + 5.0)
        except AssertionError:
            return time.monotonic() - started, run.output(), ["it does not end"]
        seconds, output, found = time.monotonic() - started, run.output(), []
        if "FAULT" not in output:
            found.append("the point was not reached")
        if seconds > MOST_SECONDS:
            found.append(f"it ended after {seconds:.1f} s")
        if code not in (0, 1):
            found.append(f"exit code {code}")
        return seconds, output, found

    def resume(self, run_dir: Path, case: Case) -> list[str]:
        """Faults of the checkpoints that are there, and of the run that is resumed."""
        found = []
        self.volume.repair()
        if case.fault == "removed" and complete_steps(run_dir):
            found.append("a checkpoint was written into the removed directory")
        newest = complete_steps(run_dir)[-1] if complete_steps(run_dir) else 0
        if newest:
            found += [
                f"step {entry.step} is {entry.state}"
                for entry in verify_run(run_dir)
                if entry.step in complete_steps(run_dir) and entry.state != "good"
            ]
        with self.started(run_dir, Case("kill", "none", 1)) as run:
            code, _ = run.end(START_SECONDS)
            output = run.output()
        if code != 0 or (f"resumed at step {newest}" in output) != bool(newest):
            found.append(f"cannot be resumed at step {newest}: {output}")
        elif final_state(run_dir) != final_state(self.uninterrupted):
            found.append("another final state")
        elif metrics_of(run_dir) != metrics_of(self.uninterrupted):
            found.append("other metrics")
        return found


def run_cases(folder: Path, cases: Sequence[Case]) -> Iterator[tuple[Case, Result]]:
    """Results of the cases, in a folder whose file system has nothing to do with the runs'."""
    text_file = folder / "corpus.txt"
    text_file.write_text("\0".join(f"document {i}: " + "ab c" * (50 * i) for i in range(1, 41)))
    with mounted_volume(folder) as volume:
        harness = Harness(folder, volume, text_file, cache=f"{folder}/compiled")
        for case in cases:
            yield case, harness.run(case)


def main() -> int:
    """Prints every case; the exit code is 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a text in the case's name, such as full")
    options = parser.parse_args()
    cases = [case for case in all_cases() if options.only in str(case)]
    # Orbax warns of every directory that is opened to be read.
    logging.getLogger("absl").setLevel(logging.ERROR)
    started, longest, num_faults = time.monotonic(), 0.0, 0
    folder = Path(tempfile.mkdtemp())
    try:
        for case, result in run_cases(folder, cases):
            longest = max(longest, result.seconds)
            num_faults += bool(result.faults)
            print(f"{case}: {result.seconds:.1f} s: {result.message}", flush=True)
            for fault in result.faults:
                print(f"FAULT {case}: {fault}", flush=True)
    finally:
        shutil.rmtree(folder)
    print(
        f"{len(cases)} cases, longest {longest:.1f} s from the fault to the end, "
        f"{time.monotonic() - started:.0f} s: {num_faults} faults"
    )
    return int(num_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
