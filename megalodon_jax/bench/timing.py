"""Seconds of one call of a compiled function, by the host's clock."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

MOST_QUEUED = 40


def seconds_per_call(
    function: Callable[..., Any], *arguments: Any, repeats: int = 5, seconds: float = 0.3
) -> float:
    """Median over `repeats` of the time of a call among many that wait in the device's queue.

    Up to 40 calls are queued, and the host waits for the last; nothing is subtracted. On a GPU or
    TPU the next launch then overlaps with the call that runs, so launching costs nothing as long as
    a call takes longer than it (about 30 microseconds); shorter calls are measured as their launch.
    A CPU runs queued calls side by side, so there every call is waited for.

    All calls read the same arguments, as far as they fit from a warm cache.

    Args:
      function: compiled already, or compiled by its first call, which is not timed.
      arguments: what it is called with.
      repeats: how often the queue is filled.
      seconds: how long one queue should run; decides the number of its calls.
    """
    jax.block_until_ready(function(*arguments))
    estimate = _seconds_of_queue(function, arguments, 1)
    most = 1 if jax.default_backend() == "cpu" else MOST_QUEUED
    calls = max(1, min(most, math.ceil(seconds / estimate)))
    return statistics.median(
        _seconds_of_queue(function, arguments, calls) / calls for _ in range(repeats)
    )


def _seconds_of_queue(
    function: Callable[..., Any], arguments: tuple[Any, ...], calls: int
) -> float:
    start = time.perf_counter()
    for _ in range(calls - 1):
        function(*arguments)
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start
