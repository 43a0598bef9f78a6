"""A save in progress: Orbax's commit, then the manifest, in a thread of its own."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp

from megalodon_jax.checkpoints.items import reason
from megalodon_jax.parallel.failures import failure_elsewhere, report_failure

_POLL_SECONDS = 0.2


class PendingSave:
    """Runs the rest of a save in the background.

    Args:
      step: step of the checkpoint.
      finish: waits for the commit and writes the manifest.
    """

    def __init__(self, step: int, finish: Callable[[], None]) -> None:
        self.step = step
        self.error: Exception | None = None
        self._finish = finish
        # A daemon: Orbax may wait minutes for processes that have failed.
        self._thread = threading.Thread(target=self._run, name="finish_save", daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        """Whether the save has neither completed nor failed."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Waits until the save has completed or failed, here or in another process."""
        while self.is_running() and failure_elsewhere() is None:
            self._thread.join(_POLL_SECONDS)

    def _run(self) -> None:
        try:
            self._finish()
        # Any error of Orbax is the error of this save.
        except Exception as error:
            self.error = error
            report_failure(f"checkpoint of step {self.step} was not written: {reason(error)}")


def make_barrier() -> Callable[..., Any]:
    """Orbax's barrier of writer threads, without the wait of a process whose own write failed.

    Orbax takes that process to the barriers behind the save, where it waits 20 minutes for the
    others, which wait for it at another barrier.
    """
    barrier = ocp.multihost.get_barrier_sync_fn()

    def synchronize(*, key: str, timeout_ms: int) -> None:
        if (error := sys.exception()) is not None:
            raise error
        barrier(key=key, timeout_ms=timeout_ms)

    return synchronize
