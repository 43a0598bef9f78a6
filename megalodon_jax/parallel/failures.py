"""Failures of one process that the others must learn of, without a collective of devices.

They travel through the key-value store of `jax.distributed`: the other processes may be in a step
or in a save, and a collective of this process would wait for them.
"""

import contextlib
import os
import sys
import threading
from typing import Any

import jax

# The coordination client has no public name.
from jax._src import distributed as jax_distributed

_FOLDER = "megalodon_failures/"
EXIT_SECONDS = 3.0


def _client() -> Any:
    return jax_distributed.global_state.client


def report_failure(message: str) -> None:
    """Tells the other processes that this one has failed; does nothing in a single process."""
    if jax.process_count() > 1:
        key = f"{_FOLDER}{jax.process_index()}"
        # Without process 0 nobody is left to be told.
        with contextlib.suppress(RuntimeError):
            _client().key_value_set(key, message, allow_overwrite=True)


def failure_elsewhere() -> str | None:
    """The failure of another process, with its number; None: no other process has failed."""
    if jax.process_count() == 1:
        return None
    own = f"{_FOLDER}{jax.process_index()}"
    try:
        reported = _client().key_value_dir_get(_FOLDER)
    except RuntimeError as error:
        return f"process 0 of the run cannot be reached: {str(error).splitlines()[0]}"
    for key, message in reported:
        if key != own:
            return f"process {key.removeprefix(_FOLDER)} of the run failed: {message}"
    return None


def barrier_outside_devices(name: str, *, seconds: float) -> None:
    """Waits until all processes are here; devices take no part.

    Args:
      name: a name that is used once.
      seconds: time after which the wait fails.
    """
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"megalodon_{name}", int(seconds * 1000))


def exit_without_threads(exit_code: int) -> None:
    """Ends the process soon after its main thread, even if other threads still wait.

    Python waits at exit for all threads that are not daemons. Those of a save that failed in
    another process wait for minutes at a barrier.
    """

    def wait_and_exit() -> None:
        threading.main_thread().join()
        # Time for handlers at exit, if no thread is in their way.
        threading.Event().wait(EXIT_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    threading.Thread(target=wait_and_exit, name="exit_without_threads", daemon=True).start()
