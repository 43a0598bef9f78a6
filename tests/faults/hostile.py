"""Hostile files, the limits of reading one, and the runner in a process of its own.

`Runner` starts one process that reads file after file. It fails a file that executes code, crashes
or hangs the interpreter, takes more memory than allowed, or ends in another error than this
package's.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
SECONDS_PER_FILE = 10.0
MAX_EXTRA_BYTES = 300_000_000
Special = Literal["zero", "pipe", "directory", "sparse"]
SUFFIXES = {
    "torch": ".pt", "safetensors": ".safetensors", "released": "", "config": ".toml",
    "tokenizers": ".json", "sentencepiece": ".model", "text": ".txt", "jsonl": ".jsonl",
    "gzip": ".txt.gz", "parquet": ".parquet", "huggingface": "",
}  # fmt: skip


@dataclass(frozen=True)
class Hostile:
    """One file.

    Attributes:
      kind: which reader gets it, a key of `SUFFIXES`.
      name: what is wrong with it.
      content: its bytes; by name for a folder; or a special file.
      is_refused: whether it must end in an error; other files may also be accepted.
    """

    kind: str
    name: str
    content: bytes | dict[str, bytes] | Special
    is_refused: bool = False

    def write(self, folder: Path) -> Path:
        """Writes the file; returns its path."""
        folder.mkdir(parents=True)
        path = folder / f"file{SUFFIXES[self.kind]}"
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        elif isinstance(self.content, dict):
            for name, content in self.content.items():
                (folder / name).write_bytes(content)
            return path if SUFFIXES[self.kind] else folder
        elif self.content == "zero":
            path.symlink_to("/dev/zero")
        elif self.content == "pipe":
            os.mkfifo(path)
        elif self.content == "directory":
            path.mkdir()
        else:
            with path.open("wb") as file:
                file.truncate(1 << 40)
        return path


def refused(kind: str, name: str, content: bytes | dict[str, bytes] | Special) -> Hostile:
    """A file that must end in an error."""
    return Hostile(kind, name, content, is_refused=True)


@dataclass(frozen=True)
class Verdict:
    """The result of reading one file.

    Attributes:
      file: the file.
      outcome: "accepted", "refused", or what must not be.
      message: the error's text.
      seconds: time it took.
      extra_bytes: peak memory above that before.
    """

    file: Hostile
    outcome: str
    message: str = ""
    seconds: float = 0.0
    extra_bytes: int = 0

    @property
    def is_fault(self) -> bool:
        """Whether this must not be."""
        if self.outcome == "accepted":
            return self.file.is_refused
        # One line, and short, although names and values come from the file.
        is_clear = 10 < len(self.message) < 4000 and self.message.isprintable()
        return self.outcome != "refused" or not is_clear

    def __str__(self) -> str:
        size = f"{self.extra_bytes / 1e6:.0f} MB, {self.seconds:.1f} s"
        return f"{self.file.kind}, {self.file.name}: {self.outcome} ({size}) {self.message:.200}"


class Runner:
    """Reads hostile files in a process that is started again when it dies."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def run(self, files: Sequence[Hostile]) -> list[Verdict]:
        """The verdicts on files."""
        try:
            return [self._run_one(i, file) for i, file in enumerate(files)]
        finally:
            self._stop()

    def _run_one(self, index: int, file: Hostile) -> Verdict:
        path = file.write(self._folder / f"{index}")
        process = self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps([file.kind, str(path), str(self._folder / "out")]) + "\n")
        process.stdin.flush()
        begin = time.monotonic()
        line = self._line(SECONDS_PER_FILE)
        seconds = time.monotonic() - begin
        if line is None:
            self._stop()
            return Verdict(file, "hangs", seconds=seconds)
        if not line:
            code = process.wait()
            self._process = None
            return Verdict(file, f"ends the interpreter with {code}", seconds=seconds)
        outcome, message, extra_bytes = json.loads(line)
        if (self._folder / "canary").exists():
            outcome = "executes code"
        elif extra_bytes > MAX_EXTRA_BYTES:
            outcome = "takes too much memory"
        return Verdict(file, outcome, message, seconds, extra_bytes)

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.hostile_reader"],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            if self._line(120.0) != "ready\n":
                raise RuntimeError("the reader did not start")
        return self._process

    def _line(self, timeout: float) -> str | None:
        """The next line of the process; empty if it has ended, None if it takes too long."""
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        return self._process.stdout.readline() if ready else None

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
