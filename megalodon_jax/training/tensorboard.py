"""TensorBoard's event file, written in the calling thread.

tensorboardX's `SummaryWriter` writes in a thread of its own. If the disk is full, that thread ends
and the next flush waits for it forever; its queue takes semaphores that a killed process leaves.
"""

import socket
import struct
import time
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

# The classes are made at import; type checkers do not see them.
_Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
_SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]


class EventFile:
    """A new event file in a folder; every method may raise an `OSError`.

    Args:
      folder: created if it does not exist.
      purge_step: TensorBoard drops the points of earlier files from this step on.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._file = (folder / name).open("xb")
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=_SessionLog(status=_SessionLog.START))
        self.flush()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point; `flush` writes it."""
        self._add(step=step, summary=summary.scalar(name, value))

    def add_text(self, name: str, text: str, step: int) -> None:
        """Adds a text; `flush` writes it."""
        self._add(step=step, summary=summary.text(name, text))

    def flush(self) -> None:
        """Writes what was added."""
        self._file.flush()

    def close(self) -> None:
        """Writes what was added and closes the file."""
        self._file.close()

    def _add(self, **fields: Any) -> None:
        """Adds a TFRecord: length, its checksum, the event, its checksum."""
        event = _Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, event)]
        self._file.write(length + checksums[0] + event + checksums[1])
