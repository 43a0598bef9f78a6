"""Scratch directories on the local disk, which do not outlive their process for long."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "megalodon_scratch_"
_OWNED = "owned"


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A new directory in `$TMPDIR` (default /tmp), removed at the end.

    That of a killed process is removed by the next call of the same user on this machine: the
    kernel releases the lock of a process that has ended.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    unlocked = directory / "unlocked"
    with unlocked.open("wb") as owned:
        fcntl.flock(owned, fcntl.LOCK_EX)
        # Nobody finds the file before it is locked.
        unlocked.rename(directory / _OWNED)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for directory in parent.glob(f"{_PREFIX}*"):
        # Another user's, or one that another process removes or has just made.
        with contextlib.suppress(OSError), (directory / _OWNED).open("rb") as owned:
            fcntl.flock(owned, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if directory.stat().st_uid == os.getuid():
                shutil.rmtree(directory, ignore_errors=True)
