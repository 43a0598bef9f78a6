"""The small files of a run (metrics, TensorBoard, configuration), also where none can be appended.

They are written to a local directory: the run directory itself, or a scratch directory from which
they are copied to an object store.
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megalodon_jax.checkpoints.directory import LocalDirectory, open_directory
from megalodon_jax.checkpoints.store_directory import StoreDirectory
from megalodon_jax.errors import CheckpointError, RunLockedError
from megalodon_jax.storage.scratch import scratch_directory

COPY_SECONDS = 30.0
# A copy takes at most this share of the time, however large the files become.
_SHARE_OF_TIME = 0.1
# Files that a resumed run goes on writing.
_CONTINUED = ("metrics.jsonl", "run_time.json")


@contextlib.contextmanager
def open_run_files(run_dir: str) -> Iterator["RunFiles"]:
    """The files of a run; a scratch directory for them is removed at the end.

    Nothing is created in `run_dir`, a path or a URL.
    """
    target = open_directory(run_dir)
    if isinstance(target, LocalDirectory):
        yield RunFiles(Path(run_dir))
        return
    with scratch_directory() as scratch:
        written, copied = scratch / "run", scratch / "copied"
        written.mkdir()
        yield RunFiles(written, target=target, snapshots=copied)


class RunFiles:
    """The files of a run and their copies in an object store; thread-safe.

    Args:
      local: the directory in which they are written.
      target: where they are copied to; None: they stay.
      snapshots: directory for files while they are uploaded.

    Attributes:
      local: as given.
    """

    def __init__(
        self, local: Path, *, target: StoreDirectory | None = None, snapshots: Path = Path()
    ) -> None:
        self.local = local
        self._target = target
        self._snapshots = snapshots
        self._check_owner: Callable[[], None] = lambda: None
        self._copied: dict[str, tuple[int, int]] = {}
        self._copying = threading.Lock()
        self._stop = threading.Event()
        self._told_failure = False

    @contextlib.contextmanager
    def copies(self, check_owner: Callable[[], None], *, continue_earlier: bool) -> Iterator[None]:
        """Inside, files are copied to the store at intervals, and at the end.

        Args:
          check_owner: raises `RunLockedError` if another process owns the run; called before each
            copy.
          continue_earlier: fetch the metrics of earlier starts first, because an object cannot be
            appended to.

        Raises:
          CheckpointError: the earlier files cannot be read, or the last copy failed.
        """
        if self._target is None:
            yield
            return
        self._check_owner = check_owner
        if continue_earlier:
            try:
                names = [name for name in self._target.names() if name in _CONTINUED]
                self._target.download(self.local, names)
            except OSError as error:
                raise CheckpointError(
                    f"cannot read the metrics in {self._target}: {error}"
                ) from error
            self._copied = dict(self._marks())
        thread = threading.Thread(target=self._copy_at_intervals, name="copy_logs", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._stop.set()
            # The error of the run is raised; a store that is away must not hide it, nor hold it up.
            last = threading.Thread(target=self._copy_quietly, daemon=True)
            last.start()
            last.join(5.0)
            raise
        self._stop.set()
        self.copy()

    def copy(self) -> None:
        """Copies what has changed since the last copy; does nothing for a local run.

        Raises:
          CheckpointError: the store refuses.
          RunLockedError: another process owns the run.
        """
        if self._target is None:
            return
        with self._copying:
            self._check_owner()
            changed = {name: mark for name, mark in self._marks() if self._copied.get(name) != mark}
            try:
                # A file that grows during its upload would not have the size that was announced.
                for name in changed:
                    snapshot = self._snapshots / name
                    snapshot.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.local / name, snapshot)
                self._target.upload(self._snapshots, changed)
                shutil.rmtree(self._snapshots, ignore_errors=True)
            except OSError as error:
                raise CheckpointError(
                    f"metrics and logs cannot be copied to {self._target}: {error}"
                ) from error
            self._copied.update(changed)

    def _marks(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names of all files but temporary ones, with what tells that they changed."""
        for path in sorted(self.local.rglob("*")):
            name = path.relative_to(self.local).as_posix()
            if path.is_file() and path.suffix != ".tmp":
                status = path.stat()
                yield name, (status.st_size, status.st_mtime_ns)

    def _copy_at_intervals(self) -> None:
        seconds = COPY_SECONDS
        while not self._stop.wait(seconds):
            started = time.monotonic()
            self._copy_quietly()
            seconds = max(COPY_SECONDS, (time.monotonic() - started) / _SHARE_OF_TIME)

    def _copy_quietly(self) -> None:
        try:
            self.copy()
            self._told_failure = False
        except RunLockedError:
            # The main thread finds out at its next check.
            self._stop.set()
        except CheckpointError as error:
            if not self._told_failure:
                print(f"{error}; trying again", file=sys.stderr, flush=True)
            self._told_failure = True
