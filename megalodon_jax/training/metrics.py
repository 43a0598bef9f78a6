"""Where a run's numbers are written: log files, and a progress display."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megalodon_jax.errors import ConfigError


class RunLog:
    """Writes a run's numbers to `metrics.jsonl`, TensorBoard and, if asked, wandb.

    One line of `metrics.jsonl` is one call of `write`. A resumed run appends: where a step appears
    twice, the later line counts.

    Raises:
      ConfigError: `wandb_project` is set but wandb is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: Mapping[str, Any],
        first_step: int = 0,
        wandb_project: str = "",
    ) -> None:
        from tensorboardX import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        self._wandb = _start_wandb(wandb_project, run_dir, config) if wandb_project else None
        self._lines = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=first_step or None, write_to_disk=True
        )

    def write(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Records `numbers` under `step`; entries that are None are left out."""
        known = {name: float(value) for name, value in numbers.items() if value is not None}
        # JSON has no NaN or infinity; a string keeps the line readable by strict parsers.
        line = {
            name: value if math.isfinite(value) else str(value) for name, value in known.items()
        }
        print(json.dumps({"step": step, **line}), file=self._lines, flush=True)
        for name, value in known.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(known, step=step)

    def close(self) -> None:
        """Flushes and closes every destination."""
        self._lines.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(project: str, run_dir: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"wandb_project is {project!r} but wandb is not installed; "
            "install megalodon-flax[wandb] or leave wandb_project empty"
        ) from error
    return wandb.init(project=project, dir=str(run_dir), config=dict(config))


class ProgressDisplay:
    """A bar on a terminal, plain lines elsewhere: loss, tokens/s, MFU, time left.

    Use as a context manager.

    Args:
      first_step: updates done before.
      steps: updates of the run.
      silent: show nothing, as all processes of a run but one do.
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
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=steps, completed=first_step, numbers="")

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
        """Estimates the time left from here on (compilation is over)."""
        self._first_step, self._started = step, time.monotonic()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; nothing without a terminal."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, numbers: str) -> None:
        """Shows the newest measurements."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        if self._silent:
            return
        left = ""
        if step > self._first_step:
            seconds = (time.monotonic() - self._started) / (step - self._first_step)
            left = f"  left {format_seconds(seconds * (self._steps - step))}"
        print(f"step {step}/{self._steps}  {numbers}{left}", flush=True)

    def message(self, text: str) -> None:
        """Prints a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._silent:
            print(text, flush=True)


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
