"""Ends the processes of a run soon after one of them has died.

A process that was killed says nothing, and the others wait for it in a collective, which cannot be
interrupted. Every process counts up a number in the key-value store of `jax.distributed`; process 0
reads the numbers of all others, and they read that of process 0.
"""

import os
import threading
import time
from types import TracebackType
from typing import Any, Self

import jax

# The coordination client has no public name.
from jax._src import distributed as jax_distributed

# EX_TEMPFAIL of sysexits.h: a restart may succeed.
LOST_PROCESS_EXIT_CODE = 75
_ALIVE, _LOST = "megalodon_alive/", "megalodon_lost"
_INTERVAL_SECONDS = 2.0


class LivenessWatch:
    """A thread that ends this process if another one of the run has given no sign of life.

    It does nothing in a single process. Use as a context manager around the training.

    Args:
      seconds: time without a sign of life after which a process counts as lost.
    """

    def __init__(self, *, seconds: float = 18.0) -> None:
        self._limit = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)

    def __enter__(self) -> Self:
        if jax.process_count() > 1:
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

    def _watch(self) -> None:
        client: Any = jax_distributed.global_state.client
        index = jax.process_index()
        signs: dict[str, tuple[str, float]] = {}
        count, last_tick = 0, time.monotonic()
        try:
            while not self._ended.wait(_INTERVAL_SECONDS):
                count, now = count + 1, time.monotonic()
                # This process was stopped (SIGSTOP, a suspended machine): it saw no signs.
                if now - last_tick > 5 * _INTERVAL_SECONDS:
                    signs.clear()
                last_tick = now
                client.key_value_set(f"{_ALIVE}{index}", str(count), allow_overwrite=True)
                if index == 0:
                    found = dict(client.key_value_dir_get(_ALIVE))
                else:
                    if (reason := _read(client, _LOST)) is not None:
                        _end_process(reason)
                    first = _read(client, f"{_ALIVE}0")
                    found = {} if first is None else {f"{_ALIVE}0": first}
                # A process that has left has deleted its number.
                signs = {
                    key: signs[key] if signs.get(key, ("", 0.0))[0] == sign else (sign, now)
                    for key, sign in found.items()
                }
                silent = [key for key, (_, seen) in signs.items() if now - seen > self._limit]
                if silent:
                    self._end(client, silent[0].removeprefix(_ALIVE))
            client.key_value_delete(f"{_ALIVE}{index}")
        except jax.errors.JaxRuntimeError as error:
            if not self._ended.is_set():
                _end_process(f"process 0 cannot be reached ({str(error).splitlines()[0]})")

    def _end(self, client: Any, lost: str) -> None:
        reason = f"process {lost} of the run gave no sign of life for {self._limit:.0f} s"
        if jax.process_index() == 0:
            client.key_value_set(_LOST, reason, allow_overwrite=True)
            # Process 0 has the store: the others need time to read it.
            time.sleep(2 * _INTERVAL_SECONDS)
        _end_process(reason)


def _read(client: Any, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None


def _end_process(reason: str) -> None:
    text = (
        f"\nmegalodon: {reason}: ending this process with exit code {LOST_PROCESS_EXIT_CODE}; "
        "start all processes again with --resume\n"
    )
    # The standard stream may be replaced or locked; the descriptor is neither.
    os.write(2, text.encode())
    os._exit(LOST_PROCESS_EXIT_CODE)
