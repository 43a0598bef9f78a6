"""SIGINT and SIGTERM: the first asks the run to stop, the second ends the process at once.

A handler in Python runs when the main thread returns from compiled code, which may take minutes
(compilation, a collective). A thread therefore reads the signals as they arrive.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
# Launchers signal a process and its group: a copy of the first signal arrives just after it.
_COPY_SECONDS = 0.3
_ANSWER_SECONDS = 2.0
_END = 0


class StopRequest:
    """A request to stop after the current step, batch or token.

    Attributes:
      signal: the signal that asked this process, or another one of the run, to stop; None: none.
      describe_saved: says which checkpoint is saved, for the message of the second signal.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.describe_saved: Callable[[], str] = lambda: "nothing saved"


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a `StopRequest`.

    The second one ends the process at once, also during compilation, with exit code 128 + its
    number and a message that says what is saved.
    """
    request = StopRequest()
    # Python allows handlers in the main thread only; elsewhere the caller handles signals.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def remember(number: int, frame: FrameType | None) -> None:
        request.signal = request.signal or signal.Signals(number)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(
        target=_read_signals, args=(reader, request), name="signals", daemon=True
    )
    thread.start()
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = [signal.signal(number, remember) for number in _NUMBERS]
    try:
        yield request
    finally:
        for number, handler in zip(_NUMBERS, previous, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        os.write(writer, bytes([_END]))
        thread.join()
        os.close(reader)
        os.close(writer)


def _read_signals(reader: int, request: StopRequest) -> None:
    first: float | None = None
    while (number := os.read(reader, 1)[0]) != _END:
        if number not in _NUMBERS:
            continue
        now = time.monotonic()
        # Another process's signal sets the request too, so that this thread counts its own.
        if first is None:
            first = now
            request.signal = request.signal or signal.Signals(number)
        elif now - first > _COPY_SECONDS:
            _exit_at_once(signal.Signals(number), request)


def _exit_at_once(number: signal.Signals, request: StopRequest) -> None:
    answers: list[str] = []

    def ask() -> None:
        try:
            answers.append(request.describe_saved())
        except OSError as error:
            answers.append(f"cannot read the run directory ({error})")

    # A storage that is away may not answer for minutes.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)
    saved = answers[0] if answers else "the run directory gives no answer"
    # `os.write`: the main thread may hold the lock of `sys.stderr`.
    os.write(2, f"\nmegalodon: second {number.name}: stopped at once; {saved}\n".encode())
    if sys.stdout.isatty():
        # The progress bar hides the cursor.
        os.write(1, b"\x1b[?25h")
    os._exit(128 + number)
