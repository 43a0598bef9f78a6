"""Ctrl-C that is not lost."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interrupt:
    """Raises KeyboardInterrupt at Ctrl-C, and again at the next `check`.

    Python drops an exception that a signal raises in a destructor or in a callback from C code: the
    program would go on.

    Example:
      with Interrupt() as interrupt:
          for piece in pieces:
              interrupt.check()
    """

    def __init__(self) -> None:
        self._is_set = False
        self._previous: object = None

    def __enter__(self) -> Self:
        # Python has signals in its main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._is_set = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was a signal."""
        if self._is_set:
            raise KeyboardInterrupt
