"""A profiler's trace of some steps of a run, which XProf and Perfetto open."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

FOLDER = "profile"


class StepTrace:
    """Traces the updates of `profile_steps` with `jax.profiler`; use as a context manager.

    Args:
      steps: number of the first update to trace, and of the first one after them; None: no trace.
      run_dir: the trace is in its folder `profile`.
    """

    def __init__(self, steps: tuple[int, int] | None, run_dir: str | Path) -> None:
        self._steps = steps
        self.folder = Path(run_dir) / FOLDER
        self._is_active = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    @contextmanager
    def step(self, number: int, newest: Any) -> Iterator[None]:
        """Wraps the dispatch of an update.

        Args:
          number: number of the update, 1 for the first one.
          newest: metrics of the last update that was dispatched, if any.
        """
        if self._steps is None or not self._steps[0] <= number < self._steps[1]:
            # Earlier updates may still run when the first one after the range is dispatched.
            if self._is_active:
                jax.block_until_ready(newest)
                self._stop()
            yield
            return
        if not self._is_active:
            # Earlier updates, such as the first one's compilation, stay out of the trace.
            jax.block_until_ready(newest)
            jax.profiler.start_trace(str(self.folder))
            self._is_active = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def _stop(self) -> None:
        if self._is_active:
            jax.profiler.stop_trace()
            self._is_active = False
