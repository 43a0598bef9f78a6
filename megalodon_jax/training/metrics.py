"""Output of a run's metrics: log files and the progress display."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megalodon_jax.training.writers import MetricWriter, TensorBoardWriter, WandbWriter, naming


class RunLog:
    """Writes metrics to `metrics.jsonl` and to other writers.

    Every call of `write` appends one line to `metrics.jsonl`. A resumed run appends too: if a step
    appears twice, the later line is valid. A last line that a kill has cut off is removed.

    Args:
      run_dir: the run's directory.
      config: the resolved configuration, for wandb.
      first_step: step from which a run resumes.
      wandb_project: wandb project; empty: no wandb.
      writers: the other writers; None: TensorBoard, and wandb if there is a project.

    Raises:
      ConfigError: `wandb_project` is set but wandb is not installed.
      OSError: a file cannot be written; every method may raise it, with the file's name.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: Mapping[str, Any],
        first_step: int = 0,
        wandb_project: str = "",
        writers: Sequence[MetricWriter] | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self._writers = list(writers or ())
        if wandb_project and writers is None:
            self._writers.append(WandbWriter(wandb_project, run_dir=run_dir, config=config))
        _complete_last_line(run_dir / "metrics.jsonl")
        self._path = run_dir / "metrics.jsonl"
        self._lines = self._path.open("a", encoding="utf-8")
        if writers is None:
            board = TensorBoardWriter(run_dir / "tensorboard", first_step=first_step)
            self._writers.insert(0, board)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Records the metrics of a step; those that are None are skipped."""
        values = {name: float(value) for name, value in metrics.items() if value is not None}
        line = {name: _strict(value) for name, value in values.items()}
        self._write_line({"step": step, **line})
        for writer in self._writers:
            writer.write(step, values)

    def write_changes(self, step: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
        """Records settings that a resumed run has changed: their old and new values."""
        line = {name: [_strict(value) for value in values] for name, values in changes.items()}
        self._write_line({"step": step, "changed_settings": line})
        text = "; ".join(f"{name}: {old!r} to {new!r}" for name, (old, new) in changes.items())
        for writer in self._writers:
            writer.write_text(step, "changed_settings", text)

    def make_durable(self) -> None:
        """Waits until the lines so far are on the disk, as those of a checkpoint must be."""
        with naming(self._path):
            os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Flushes and closes all outputs; the first error is raised after all are closed."""
        with ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
            with naming(self._path):
                self._lines.close()

    def _write_line(self, record: Mapping[str, Any]) -> None:
        with naming(self._path):
            print(json.dumps(record), file=self._lines, flush=True)


def _strict(value: Any) -> Any:
    """NaN and infinity as text: strict JSON parsers reject them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _complete_last_line(path: Path) -> None:
    """Ends a last line that has no line break, or removes it if it is no JSON either."""
    content = path.read_bytes() if path.exists() else b""
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    try:
        json.loads(content[start:])
    except ValueError:
        with path.open("r+b") as file:
            file.truncate(start)
        return
    with path.open("ab") as file:
        file.write(b"\n")


class ProgressDisplay:
    """A progress bar on a terminal, else plain lines: loss, tokens/s, MFU, remaining time.

    Use as a context manager.

    Args:
      first_step: number of updates before this run was resumed.
      steps: number of updates of the run.
      silent: show nothing; for all processes except process 0.
    """

    def __init__(self, *, first_step: int, steps: int, silent: bool = False) -> None:
        self._steps = steps
        self._first_step = first_step
        self._started = time.monotonic()
        self._console = Console(file=sys.stdout)
        self._silent = silent
        self._bar: Progress | None = None
        if self._console.is_terminal and not silent:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[metrics]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=steps, completed=first_step, metrics="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def restart(self, step: int) -> None:
        """Restarts the estimate of the remaining time, after compilation."""
        self._first_step, self._started = step, time.monotonic()

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`; does nothing without a terminal."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: str) -> None:
        """Shows the latest metrics."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=metrics)
            return
        if self._silent:
            return
        remaining = ""
        if step > self._first_step:
            seconds = (time.monotonic() - self._started) / (step - self._first_step)
            remaining = f"  left {format_seconds(seconds * (self._steps - step))}"
        print(f"step {step}/{self._steps}  {metrics}{remaining}", flush=True)

    def message(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._silent:
            print(text, flush=True)


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
