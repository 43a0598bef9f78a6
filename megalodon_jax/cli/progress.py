"""A line on stderr that says what a command is doing."""

import sys
import threading
import time
from types import TracebackType
from typing import Self, TextIO

# Seconds between lines in a file or pipe; short work prints nothing there.
_LINE_INTERVAL = 10.0
# Seconds after which a terminal shows how long the present work has taken.
_SHOWN_SECONDS = 2


class Progress:
    """Shows the present work on stderr: one line that is replaced in a terminal.

    In a file or pipe a line is written every ten seconds, while work goes on. A context: the line
    is removed at its end.
    """

    def __init__(self, file: TextIO | None = None, *, interval: float | None = None):
        self._file = sys.stderr if file is None else file
        self._is_terminal = self._file.isatty()
        self._text = ""
        self._since = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._interval = interval or (1.0 if self._is_terminal else _LINE_INTERVAL)
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self.clear()

    def show(self, text: str) -> None:
        """Replaces the line."""
        with self._lock:
            if text == self._text:
                return
            self._text, self._since = text, time.monotonic()
            if self._is_terminal:
                self._write(f"\r\x1b[K{text}")

    def clear(self) -> None:
        """Removes the line, so that text can be written."""
        with self._lock:
            if self._text and self._is_terminal:
                self._write("\r\x1b[K")
            self._text = ""

    def _repeat(self) -> None:
        while not self._stopped.wait(self._interval):
            with self._lock:
                seconds = int(time.monotonic() - self._since)
                if not self._text:
                    continue
                if not self._is_terminal:
                    self._write(f"{self._text}\n")
                elif seconds >= _SHOWN_SECONDS:
                    self._write(f"\r\x1b[K{self._text} ({seconds} s)")

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
