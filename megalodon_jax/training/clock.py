"""Training speed between two reports, without compilation, evaluation and checkpoints."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class ThroughputClock:
    """Counts tokens and the seconds of training in which they were processed."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a new interval."""
        self._started = time.monotonic()
        self._paused = 0.0
        self._excluded_tokens = 0.0

    def seconds(self) -> float:
        """Seconds of this interval, without pauses."""
        return time.monotonic() - self._started - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out the seconds inside: evaluation, checkpoints."""
        started = time.monotonic()
        yield
        self._paused += time.monotonic() - started

    def restart_without(self, tokens: float) -> None:
        """Begins a new interval whose first `tokens` were processed before it (compilation)."""
        self.restart()
        self._excluded_tokens = tokens

    def tokens_per_second(self, tokens: float) -> float | None:
        """Tokens/s of this interval, in which `tokens` are reported; None if none is timed."""
        return (tokens - self._excluded_tokens) / max(self.seconds(), 1e-9) or None
