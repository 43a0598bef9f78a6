"""The lock of a run directory: one owner at a time, also after crashes and preemptions.

The lock is a sequence of numbered files in `<run_dir>/.lock/`; the one with the highest number says
who owns the run. An owner changes its file's version every ten seconds (heartbeat) and marks it as
released at the end. The next owner creates the file with the next number, exclusively.

Why at most one process believes that it owns the run:
- Numbers never decrease: a file is removed only by the owner of a higher number, so the highest one
  stays. If several processes take over number n, exactly one creates n + 1.
- A process may create n + 1 late, when n + 2 exists and the first n + 1 has been removed. It lists
  the files after its own creation, sees n + 2, which was created before, and gives up.
- A former owner that still lives sees a higher number (`check`), before each commit and deletion.

No two clocks are compared: a file's version is observed to change, or not to change, by the clock
of the process that waits for it.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from megalodon_jax.checkpoints.directory import open_directory
from megalodon_jax.errors import CheckpointError, RunLockedError
from megalodon_jax.storage.location import AnyPath

FOLDER = ".lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_POLL_SECONDS = 0.5


class LockOwner(NamedTuple):
    """Who holds, or held, a lock.

    Attributes:
      identity: a random number of this acquisition.
      host: name of the machine.
      pid: number of the process.
      process_start: its start time in clock ticks since boot; with `pid` it names a process for
        good. Empty where /proc is missing.
      boot: identity of the machine's start and of the process namespace; empty where unknown.
      since: local time of the acquisition, for messages.
      released: whether the owner has ended properly.
    """

    identity: str
    host: str
    pid: int
    process_start: str
    boot: str
    since: str
    released: bool = False

    @classmethod
    def current(cls) -> Self:
        """This process."""
        return cls(
            secrets.token_hex(8),
            socket.gethostname(),
            os.getpid(),
            _process_start(os.getpid()) or "",
            _boot(),
            datetime.now().astimezone().isoformat(timespec="seconds"),
        )

    def is_gone(self) -> bool:
        """Whether the process is known to have ended; False if it runs on another machine."""
        return self.is_local() and _process_start(self.pid) != self.process_start

    def is_local(self) -> bool:
        """Whether the process runs on this machine and is seen from here."""
        return bool(self.boot) and self.boot == _boot() and self.host == socket.gethostname()


class RunLock:
    """Exclusive ownership of a run directory, from construction to `release`.

    A lock whose process has ended on this machine is taken over at once, any other lock if it has
    no heartbeat for `stale_seconds`, for which the constructor waits.

    Args:
      run_dir: the run's directory or URL; created if it does not exist.
      heartbeat_seconds: time between two heartbeats.
      stale_seconds: time without heartbeat after which another process may take over.

    Raises:
      RunLockedError: another process owns the directory.
      CheckpointError: the directory cannot be written.
    """

    def __init__(
        self,
        run_dir: str | AnyPath,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self.run_dir = run_dir
        self._directory = open_directory(run_dir).child(FOLDER)
        self._heartbeat_seconds = heartbeat_seconds
        self._stale_seconds = stale_seconds
        self._owner = LockOwner.current()
        self._told_failure = False
        self._lost: RunLockedError | None = None
        self._stop = threading.Event()
        try:
            self._directory.make()
            self._number = self._acquire()
        except OSError as error:
            raise CheckpointError(f"cannot lock {run_dir}: {error}") from error
        # A daemon: an unreleased lock does not keep the process alive.
        self._thread = threading.Thread(target=self._beat, name="run_lock", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self, *, read: bool = True) -> None:
        """Raises `RunLockedError` if another process has taken the lock over.

        Args:
          read: read the lock now; False: say what the last heartbeat found, without waiting.
        """
        if read:
            # A storage that cannot be read: whatever needs the lock fails by itself.
            with contextlib.suppress(OSError):
                self._lost = self._find_loss()
        if self._lost is not None:
            raise self._lost

    def _find_loss(self) -> RunLockedError | None:
        """The error of a process that does not own the lock any more; None if it does."""
        newest = self._newest()
        owner = self._read(newest)
        if newest > self._number:
            return RunLockedError(
                f"{self.run_dir} was taken over by {_name(owner)} because this process (pid "
                f"{self._owner.pid} on {self._owner.host}) gave no heartbeat for "
                f"{self._stale_seconds:.0f} s; it ends without writing"
            )
        if owner is None or owner.identity != self._owner.identity:
            return RunLockedError(
                f"the lock of {self.run_dir} was removed, so that another process may have started "
                "there; this process ends without writing"
            )
        return None

    def release(self) -> None:
        """Gives the lock back; does nothing if it is released or another process owns it."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        # A storage that has failed cannot be told; the lock then counts as abandoned.
        with contextlib.suppress(OSError):
            if self._newest() == self._number:
                self._write(self._owner._replace(released=True))

    def _acquire(self) -> int:
        while True:
            newest = self._newest()
            if newest:
                self._wait_until_free(newest)
            number = newest + 1
            content = _encode(self._owner)
            if self._directory.create(_file_name(number), content):
                if self._newest() == number:
                    for name in self._directory.names():
                        if _number(name) < number:
                            self._directory.remove(name)
                    return number
                self._directory.remove(_file_name(number))

    def _wait_until_free(self, number: int) -> None:
        """Returns if the lock may be taken over; raises `RunLockedError` if its owner lives."""
        name = _file_name(number)
        owner = self._read(number)
        if owner is not None and (owner.released or owner.is_gone()):
            return
        first = self._directory.version(name)
        age = self._directory.age(name)
        # On one machine both processes have the same clock.
        is_local = owner is not None and owner.is_local()
        if is_local and age is not None and 0 <= age < self._stale_seconds:
            raise self._refusal(owner, age)
        print(
            f"{self.run_dir} is locked by {_name(owner)}; waiting for its heartbeat, at most "
            f"{self._stale_seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        start = time.monotonic()
        while time.monotonic() - start < self._stale_seconds:
            time.sleep(min(_POLL_SECONDS, self._stale_seconds / 10))
            owner = self._read(number)
            if owner is not None and owner.released:
                return
            version = self._directory.version(name)
            if version is None or self._newest() > number:
                # Another process was faster; `_acquire` looks at its lock next.
                return
            if version != first:
                raise self._refusal(owner, 0.0)
        print(
            f"taking over {self.run_dir} from {_name(owner)}: no heartbeat for "
            f"{self._stale_seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def _refusal(self, owner: LockOwner | None, age: float) -> RunLockedError:
        return RunLockedError(
            f"{self.run_dir} is in use by {_name(owner)}, heartbeat {age:.0f} s ago; wait until it "
            "ends, or choose another run_dir"
        )

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_seconds):
            try:
                # The main thread finds the error at its next `check`.
                if (lost := self._find_loss()) is not None:
                    self._lost = lost
                    return
                self._directory.touch(_file_name(self._number))
                self._told_failure = False
            except OSError as error:
                if not self._told_failure:
                    print(
                        f"cannot renew the lock of {self.run_dir}: {error}; after "
                        f"{self._stale_seconds:.0f} s another process may take it over",
                        file=sys.stderr,
                        flush=True,
                    )
                self._told_failure = True

    def _newest(self) -> int:
        return max(map(_number, self._directory.names()), default=0)

    def _read(self, number: int) -> LockOwner | None:
        """The owner that a file names; None if the file is gone or only partly written."""
        try:
            fields: dict[str, Any] = json.loads(self._directory.read(_file_name(number)))
            return LockOwner(**fields)
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _write(self, owner: LockOwner) -> None:
        self._directory.write(_file_name(self._number), _encode(owner))


def _file_name(number: int) -> str:
    return f"{number:08d}"


def _number(name: str) -> int:
    return int(name) if name.isdigit() else 0


def _encode(owner: LockOwner) -> bytes:
    return json.dumps(owner._asdict()).encode()


def _name(owner: LockOwner | None) -> str:
    if owner is None:
        return "a process that has not written its name"
    return f"pid {owner.pid} on host {owner.host} since {owner.since}"


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None: no such process, or no /proc."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name, in parentheses, may contain blanks.
    fields = status.rpartition(")")[2].split()
    is_zombie = fields[0] in ("Z", "X")
    return None if is_zombie else fields[19]


def _boot() -> str:
    """The machine's start and the namespace of process numbers; empty without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
