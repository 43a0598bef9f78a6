"""A training run in a process of its own, to which a test sends real signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megalodon_jax.config import TrainConfig
from tests.fixtures_runs import TINY_TABLES

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0

# Runs `megalodon train` after the test's changes to the package.
_WORKER = """
import sys
from megalodon_jax.data import pipeline
from megalodon_jax.training import loop
from megalodon_jax.cli.main import main

pipeline.PREFETCHED_TOKENS = 1 << 10
{changes}
sys.exit(main(["train", *sys.argv[1:]]))
"""

TOML = (
    """
steps = {steps}
log_every = 1
eval_every = 0
checkpoint_every = 3
final_eval_batches = 2
sample_tokens = 0
loss_chunk_size = 64
"""
    + TINY_TABLES
)


class RunProcess:
    """A started run: its output so far, and its end."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output

    def output(self) -> str:
        """Standard output and error so far."""
        return self._output.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool] | str) -> None:
        """Waits until the condition holds or the output has this text."""
        has_happened = condition if callable(condition) else lambda: condition in self.output()
        deadline = time.monotonic() + START_SECONDS
        while not has_happened():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def end(self, seconds: float = 60.0) -> tuple[int, float]:
        """The exit code, and the seconds until the process ended."""
        started = time.monotonic()
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running after {seconds} s: {self.output()}") from error
        return code, time.monotonic() - started


@contextmanager
def started_run(
    config: TrainConfig,
    cache: str,
    *options: str,
    changes: str = "",
    steps: int = 6,
    environment: dict[str, str] | None = None,
) -> Iterator[RunProcess]:
    """Starts the tiny run in the run directory of `config`; kills it at the end if needed.

    Args:
      config: gives the text file and the run directory.
      cache: directory of compiled programs; empty: as the run's settings say.
      options: more options of `megalodon train`.
      changes: Python statements that change the package before the run.
      steps: number of updates.
      environment: more environment variables.
    """
    folder = Path(config.run_dir).parent
    toml = folder / "run.toml"
    toml.write_text(TOML.format(steps=steps, text_file=config.data.files[0], lr=1e-2))
    command = [
        "-c", _WORKER.format(changes=changes), str(toml), "--run_dir", config.run_dir, *options,
    ]  # fmt: skip
    with started_python(command, folder, cache, environment=environment) as run:
        yield run


@contextmanager
def started_python(
    arguments: Sequence[str],
    folder: Path,
    cache: str,
    *,
    environment: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[RunProcess]:
    """Starts Python with these arguments in a session of its own; kills it at the end if needed.

    Args:
      arguments: those of the interpreter.
      folder: directory of the process's output.
      cache: directory of compiled programs; empty: as the run's settings say.
      environment: more environment variables.
      prefix: a command that ends in the execution of its arguments.
    """
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache:
        variables["JAX_COMPILATION_CACHE_DIR"] = cache
    output = folder / f"output_{time.monotonic_ns()}.txt"
    with (
        output.open("wb") as file,
        subprocess.Popen(
            [*prefix, sys.executable, *arguments],
            cwd=ROOT, env={**variables, **(environment or {})}, stdout=file, stderr=file,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            yield RunProcess(process, output)
        finally:
            process.kill()
