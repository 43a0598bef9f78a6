"""Runs a study: training processes one after another, or one on each of several devices."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from megalodon_jax.errors import ConfigError
from megalodon_jax.study.definition import (
    Run,
    Stage,
    Study,
    StudyEvaluation,
    StudyExamples,
    run_name,
    stage_runs,
    start_of,
)
from megalodon_jax.study.results import (
    EVALUATIONS,
    RUN_DIR,
    RunResult,
    StudyResults,
    failed_result,
    read_result,
    read_run,
    write_result,
    write_results,
)
from megalodon_jax.study.toml_text import to_toml

# Directory of the logs of `megalodon examples`.
EXAMPLES = "examples"
_POLL_SECONDS = 0.2
# A run saves within seconds of SIGTERM; the rest is for a step and the last copy.
_STOP_SECONDS = 120.0


def run_study(
    study: Study,
    out: str | Path,
    *,
    devices: Sequence[str] = (),
    device_variable: str = "CUDA_VISIBLE_DEVICES",
    retry_failed: bool = False,
    earlier: StudyResults | None = None,
    stop: threading.Event | None = None,
    report: Callable[[str], None] = print,
) -> StudyResults:
    """Runs what is missing of a study, and writes `out/results.json` after every run.

    A run is a process `megalodon train`, with its directory below `out`. It is finished when its
    `result.json` is written: another call skips it, and resumes one that was stopped from its last
    checkpoint. A run that fails stays in the results with the end of its messages.

    Args:
      study: from `read_study`.
      out: directory of the study.
      devices: values of `device_variable`, one for each process that may run at a time; empty: one
        process, with the environment as it is.
      device_variable: the environment variable that selects a process's device.
      retry_failed: runs that failed are run again.
      earlier: results of another directory, whose runs are not repeated.
      stop: ends the running processes with SIGTERM, which saves their state, and then the study.
      report: takes lines about the progress.

    Raises:
      ConfigError: a device is named twice, or a chosen run's configuration is refused.
    """
    if len(set(devices)) < len(devices):
        raise ConfigError(f"devices are {', '.join(devices)}; name each once")
    out = Path(out)
    for result in () if earlier is None else earlier.runs:
        if result.status == "done" and not (out / run_name(result)).exists():
            write_result(out / run_name(result), result)
    stop = threading.Event() if stop is None else stop
    environments = [{device_variable: device} for device in devices] or [{}]
    pool = _Pool(out, environments, stop=stop, retry_failed=retry_failed, report=report)
    pool.write_examples(study.examples)
    results: list[RunResult] = []
    all_runs: list[Run] = []
    for stage in () if stop.is_set() else study.stages:
        best = best_points(study, stage, results) if stage.best_of else None
        runs = stage_runs(study, stage, best)
        report(f"stage {stage.name}: {len(runs)} runs")
        for chosen, point in (best or {}).items():
            report(f"  {chosen}: {', '.join(f'{k} {v}' for k, v in point.items())}")
        pool.run(runs, all_runs)
        all_runs += runs
        found = (read_result(out / run.name) for run in all_runs)
        results = [result for result in found if result is not None]
        write_results(out, study, results)
        if stop.is_set():
            break
    return StudyResults(study.name, study.title, study.metric, tuple(results), study.mode)


def best_points(
    study: Study, stage: Stage, results: Sequence[RunResult]
) -> dict[str, Mapping[str, Any]]:
    """The point with the best mean metric of every variant in the stage that `best_of` names."""
    best: dict[str, tuple[float, Mapping[str, Any]]] = {}
    points: dict[tuple[str, str], list[RunResult]] = {}
    for result in results:
        if result.stage == stage.best_of and result.status == "done":
            points.setdefault((result.variant, repr(sorted(result.point.items()))), []).append(
                result
            )
    for (variant, _), runs in points.items():
        values = [run.final.get(study.metric) for run in runs]
        if any(value is None for value in values):
            raise ConfigError(
                f"{runs[0].name} has no metric {study.metric!r}; it has "
                f"{', '.join(sorted(runs[0].final))}"
            )
        mean = sum(float(value) for value in values if value is not None) / len(values)
        cost = mean if study.mode == "min" else -mean
        if variant not in best or cost < best[variant][0]:
            best[variant] = (cost, runs[0].point)
    return {variant: point for variant, (_, point) in best.items()}


class _Pool:
    """Threads that each run one process at a time on their device."""

    def __init__(
        self,
        out: Path,
        environments: Sequence[Mapping[str, str]],
        *,
        stop: threading.Event,
        retry_failed: bool,
        report: Callable[[str], None],
    ):
        self._out = out
        self._environments = environments
        self._stop = stop
        self._retry_failed = retry_failed
        self._report = report
        # By the names of the runs that start from the weights of another.
        self._starts: dict[str, Run] = {}

    def write_examples(self, examples: Sequence[StudyExamples]) -> None:
        """Writes the files that are missing, and beside each its arguments.

        Raises:
          ConfigError: `megalodon examples` failed, or a file has other arguments or none.
        """
        for entry in examples:
            arguments = list(entry.arguments)
            file = Path(entry.file)
            record = file.with_suffix(".arguments.json")
            if file.exists():
                if record.exists() and json.loads(record.read_text()) == arguments:
                    continue
                raise ConfigError(
                    f"{file} exists, and was not written with the arguments of the examples "
                    f"{entry.name}; move it away, or name another file"
                )
            log = self._out / EXAMPLES / f"{entry.name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f"{file.name}.unfinished")
            unfinished.unlink(missing_ok=True)
            arguments[arguments.index("--out") + 1] = str(unfinished)
            code = self._process(["examples", *arguments], log, {})
            if self._stop.is_set():
                return
            if code != 0:
                raise ConfigError(f"examples {entry.name}: {_last_lines(log)}")
            record.write_text(json.dumps(list(entry.arguments)))
            os.replace(unfinished, file)
            self._report(f"{file}: examples {entry.name}")

    def run(self, runs: Sequence[Run], earlier: Sequence[Run] = ()) -> None:
        """Runs those that have no result yet.

        Runs of earlier stages whose weights are missing, because only their results came from
        another directory, are run again where others start from them.
        """
        starts = {run.name: start_of(run, earlier) for run in runs if run.init_from}
        self._starts.update({name: start for name, start in starts.items() if start is not None})
        for name in [name for name, start in starts.items() if start is None]:
            self._report(f"{name}: there is no run to start from")
        runs = [run for run in runs if not run.init_from or run.name in self._starts]
        missing = [run for run in runs if not self._is_finished(run)]
        self._run_all(self._without_weights(missing))
        self._run_all(missing)

    def _without_weights(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that others start from, of which there is only the result."""
        lost = {}
        for run in runs:
            start = self._starts.get(run.name)
            if start is None or (self._out / start.name / RUN_DIR).exists():
                continue
            result = read_result(self._out / start.name)
            if result is not None and result.status == "done" and start.name not in lost:
                self._report(f"{start.name}: its weights are not in {self._out}; it runs again")
                lost[start.name] = start
        return list(lost.values())

    def _start_name(self, run: Run) -> str:
        return self._starts[run.name].name if run.name in self._starts else ""

    def _run_all(self, runs: Iterable[Run]) -> None:
        waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
        for run in runs:
            waiting.put(run)
        with ThreadPoolExecutor(len(self._environments)) as workers:
            tasks = [workers.submit(self._work, waiting, e) for e in self._environments]
            for task in as_completed(tasks):
                if task.exception() is not None:
                    self._stop.set()
        for task in tasks:
            task.result()

    def _is_finished(self, run: Run) -> bool:
        result = read_result(self._out / run.name)
        if result is None:
            return False
        is_same = result.table == json.loads(json.dumps(run.table))
        if not is_same or result.init_from != self._start_name(run):
            raise ConfigError(
                f"{self._out / run.name} has the result of another configuration; take another "
                "--out, or remove that directory"
            )
        return result.status == "done" or not self._retry_failed

    def _work(self, waiting: "queue.SimpleQueue[Run]", environment: Mapping[str, str]) -> None:
        while not self._stop.is_set():
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._run_one(run, environment)
            except OSError as error:
                self._fail(run, exit_code=None, error=str(error))

    def _run_one(self, run: Run, environment: Mapping[str, str]) -> None:
        directory = self._out / run.name
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / "config.toml"
        config.write_text(to_toml(run.table))
        started = time.monotonic()
        self._report(f"{run.name}: starts{_on(environment)}")
        arguments = ["train", str(config), "--run_dir", str(directory / RUN_DIR), "--auto_resume"]
        if run.name in self._starts:
            arguments += ["--init_from", str(self._out / self._start_name(run) / RUN_DIR)]
        code = self._process(arguments, directory / "train.log", environment)
        if self._stop.is_set():
            self._report(f"{run.name}: stopped")
            return
        if code != 0:
            self._fail(run, exit_code=code, error=_last_lines(directory / "train.log"))
            return
        failed = self._evaluate(run, directory, environment)
        if failed is None:
            return
        result = read_run(
            run, directory, failed_evaluations=failed, init_from=self._start_name(run)
        )
        write_result(directory, result)
        self._report(f"{run.name}: {result.describe()}, {time.monotonic() - started:,.0f} s")

    def _evaluate(
        self, run: Run, directory: Path, environment: Mapping[str, str]
    ) -> dict[str, str] | None:
        """Errors of evaluations by name; None if the study was stopped."""
        failed: dict[str, str] = {}
        (directory / EVALUATIONS).mkdir(exist_ok=True)
        for entry in run.evaluations:
            target = directory / EVALUATIONS / f"{entry.name}.json"
            log = directory / EVALUATIONS / f"{entry.name}.log"
            arguments = _evaluation_arguments(entry, directory / RUN_DIR, target)
            if not target.exists() and self._process(arguments, log, environment) != 0:
                failed[entry.name] = _last_lines(log)
                self._report(f"{run.name}: {entry.name} failed: {failed[entry.name]}")
            if self._stop.is_set():
                return None
        return failed

    def _fail(self, run: Run, *, exit_code: int | None, error: str) -> None:
        result = failed_result(
            run, exit_code=exit_code, error=error, init_from=self._start_name(run)
        )
        write_result(self._out / run.name, result)
        self._report(f"{run.name}: {result.describe()}")

    def _process(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        """Runs `megalodon` with these arguments; output goes to `log`. Returns the exit code."""
        command = [sys.executable, "-m", "megalodon_jax", *arguments]
        with log.open("ab") as output, _started(command, output, environment) as process:
            while process.poll() is None:
                if self._stop.wait(_POLL_SECONDS):
                    process.send_signal(signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_STOP_SECONDS)
                    break
        return process.returncode


@contextlib.contextmanager
def _started(
    command: Sequence[str], output: Any, environment: Mapping[str, str]
) -> "Iterator[subprocess.Popen[bytes]]":
    """A process, killed if it still runs at the end."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        # Ctrl-C in the terminal reaches the study alone, which passes SIGTERM on.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _evaluation_arguments(entry: StudyEvaluation, run_dir: Path, target: Path) -> list[str]:
    return [
        "evaluate", "--checkpoint", str(run_dir), "--json", str(target), *entry.arguments,
    ]  # fmt: skip


def _on(environment: Mapping[str, str]) -> str:
    return f" on {', '.join(environment.values())}" if environment else ""


def _last_lines(log: Path) -> str:
    """The end of a process's output: its error message."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return "\n".join(lines[-3:]) or "no output"
