"""Time of one call of a compiled function, by the host's clock."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

MAX_QUEUED_CALLS = 40


def seconds_per_call(
    function: Callable[..., Any], *arguments: Any, repeats: int = 5, seconds: float = 0.3
) -> float:
    """Seconds of a call among many in the device's queue, median over `repeats`.

    Up to 40 calls are queued, and the host waits for the last one; nothing is subtracted. On a GPU
    or TPU the next launch overlaps with the running call, so the launch costs nothing for calls
    longer than it (about 30 microseconds); for shorter calls the launch is what is measured. A CPU
    runs queued calls in parallel, so there the host waits for every call.

    All calls read the same arguments, from a warm cache as far as they fit.

    Args:
      function: a compiled function, or one that its first call compiles, which is not timed.
      arguments: arguments of every call.
      repeats: number of timed queues.
      seconds: wanted duration of a queue, which sets its number of calls.
    """
    jax.block_until_ready(function(*arguments))
    estimate = _seconds_of_queue(function, arguments, 1)
    max_calls = 1 if jax.default_backend() == "cpu" else MAX_QUEUED_CALLS
    calls = max(1, min(max_calls, math.ceil(seconds / estimate)))
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
