"""`megalodon study`: a grid of training runs with one table and pictures at the end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from megalodon_jax.cli.exit_codes import signal_exit_code
from megalodon_jax.errors import ConfigError
from megalodon_jax.presets import find_study

if TYPE_CHECKING:
    from megalodon_jax.study.results import StudyResults


@dataclass(frozen=True, kw_only=True)
class StudyCommand:
    """Runs all training runs that a study's file defines, and writes one table of them.

    A study that was stopped goes on where it was: finished runs are kept, the others resume.

    Example: megalodon study ablations_30M --out runs/ablations --devices 0 1
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """A study's TOML file, or the name of a shipped one."""
    out: str = ""
    """Directory of the runs; by default runs/studies/NAME."""
    devices: tuple[str, ...] = ()
    """Devices that each run a process at a time, such as 0 1; empty: one process."""
    device_variable: str = "CUDA_VISIBLE_DEVICES"
    """Environment variable that selects a process's device."""
    retry_failed: bool = False
    """Run those again that failed."""
    results: str = ""
    """Directory for NAME.json, NAME.md and the pictures; by default that of the runs. Runs that a
    NAME.json there already has are not repeated."""
    report_only: bool = False
    """Run nothing; write the table and the pictures of RESULTS/NAME.json anew."""

    def run(self) -> int:
        """Runs the study to its end or a signal."""
        # The study's own process counts parameters; devices belong to the runs.
        import jax

        jax.config.update("jax_platforms", "cpu")
        from megalodon_jax.study.definition import read_study
        from megalodon_jax.study.results import RESULTS_FILE, read_results
        from megalodon_jax.study.schedule import run_study

        study = read_study(find_study(self.file))
        out = Path(self.out or f"runs/studies/{study.name}")
        published = Path(self.results or out)
        target = published / f"{study.name}.json"
        if not self.report_only:
            with _stop_on_signals() as (stop, received):
                run_study(
                    study,
                    out,
                    devices=self.devices,
                    device_variable=self.device_variable,
                    retry_failed=self.retry_failed,
                    earlier=read_results(target) if target.exists() else None,
                    stop=stop,
                )
            if received:
                print(f"stopped; the same command goes on with the study in {out}")
                return signal_exit_code(received[0])
            published.mkdir(parents=True, exist_ok=True)
            target.write_bytes((out / RESULTS_FILE).read_bytes())
        results = read_results(target)
        self._write(results, published)
        return 1 if any(run.status == "failed" for run in results.runs) else 0

    def _write(self, results: "StudyResults", directory: Path) -> None:
        from megalodon_jax.study.plots import draw_results
        from megalodon_jax.study.report import results_markdown

        table = results_markdown(results)
        (directory / f"{results.name}.md").write_text(table)
        print(table)
        try:
            files = draw_results(results, directory)
        except ConfigError as error:
            print(f"no pictures: {error}")
            return
        for path in files:
            print(path)


@contextmanager
def _stop_on_signals() -> Iterator[tuple[threading.Event, list[signal.Signals]]]:
    """An event that SIGINT and SIGTERM set, and the signals that came."""
    stop = threading.Event()
    received: list[signal.Signals] = []

    def handle(number: int, _frame: object) -> None:
        received.append(signal.Signals(number))
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
