"""Ends a process that hangs: dumps the stacks of all threads, then exits with its own code."""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

# EX_TEMPFAIL of sysexits.h: a restart may succeed.
WATCHDOG_EXIT_CODE = 75
STEPS_LIMIT = 20.0
_MEDIAN_OF = 64
_POLL_SECONDS = 5.0
_PUBLISH_SECONDS = 10.0


class Watchdog:
    """A thread that ends the process if nothing progresses for max(`seconds`, 20 median steps).

    A hang sits in a collective or a file system, where the main thread cannot be interrupted. The
    watch begins with the first `beat`, which comes after the first compilation. Use as a context
    manager.

    Args:
      seconds: smallest limit; 0: no watchdog.
      run_dir: local directory of `stacks_<process>.txt`.
      publish: copies that directory to where it can be read later; None: it stays.
    """

    def __init__(
        self, seconds: float, run_dir: str | Path, *, publish: Callable[[], None] | None = None
    ) -> None:
        self._publish = publish
        self._least_seconds = seconds
        self._path = Path(run_dir) / f"stacks_{jax.process_index()}.txt"
        self._steps: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._last_beat: float | None = None
        self._activity = "start-up"
        self._exempt = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._least_seconds:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, activity: str) -> None:
        """Reports progress, and what the process does next."""
        self._activity, self._last_beat = activity, time.monotonic()

    def step_took(self, seconds: float) -> None:
        """Reports the duration of a step, for the median."""
        self._steps.append(seconds)

    @contextmanager
    def exempt(self) -> Iterator[None]:
        """Inside no limit applies: a program is compiled."""
        self._exempt += 1
        try:
            yield
        finally:
            if self._last_beat is not None:
                self.beat(self._activity)
            self._exempt -= 1

    def limit(self) -> float:
        """Seconds without progress after which the process ends."""
        median = statistics.median(self._steps.copy()) if self._steps else 0.0
        return max(self._least_seconds, STEPS_LIMIT * median)

    def _watch(self) -> None:
        poll = min(_POLL_SECONDS, self._least_seconds / 10.0)
        last_tick = time.monotonic()
        while not self._ended.wait(poll):
            now = time.monotonic()
            # The whole process was stopped (SIGSTOP, a suspended machine): nothing hangs.
            if now - last_tick > 10.0 * poll and self._last_beat is not None:
                self.beat(self._activity)
            last_tick = now
            last_beat = self._last_beat
            if last_beat is not None and not self._exempt and now - last_beat > self.limit():
                self._end_process(now - last_beat)

    def _end_process(self, seconds: float) -> None:
        text = (
            f"\nmegalodon: no progress for {seconds:.0f} s in {self._activity} (limit "
            f"{self.limit():.0f} s, watchdog_seconds): ending the process with exit code "
            f"{WATCHDOG_EXIT_CODE}; resume with --resume. Stacks of all threads, also in "
            f"{self._path}:\n"
        )
        # The standard stream may be replaced or locked; the descriptor is neither.
        os.write(2, text.encode())
        faulthandler.dump_traceback(2, all_threads=True)
        try:
            with self._path.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"megalodon: cannot write {self._path}: {error}", file=sys.__stderr__)
        if self._publish is not None:
            # The storage itself may hang.
            publishing = threading.Thread(target=self._publish, daemon=True)
            publishing.start()
            publishing.join(_PUBLISH_SECONDS)
        os._exit(WATCHDOG_EXIT_CODE)
