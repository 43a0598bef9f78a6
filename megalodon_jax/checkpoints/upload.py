"""Upload of checkpoints that Orbax has written to a local scratch directory."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from megalodon_jax.checkpoints.directory import LocalDirectory
from megalodon_jax.checkpoints.store_directory import COMMIT_MARKER, StoreDirectory
from megalodon_jax.storage.scratch import scratch_directory


class Upload:
    """Uploads the checkpoints of a run, one after the other.

    Args:
      target: where the checkpoints of the run are.

    Attributes:
      directory: local directory in which Orbax writes them.
    """

    def __init__(self, target: StoreDirectory) -> None:
        self._target = target
        self._stack = contextlib.ExitStack()
        self.directory = Path(self._stack.enter_context(scratch_directory())) / "checkpoints"
        self.directory.mkdir()

    def run(self, step: int, *, check_owner: Callable[[], None]) -> None:
        """Uploads the files of a checkpoint, then its commit marker.

        Args:
          step: step of the checkpoint.
          check_owner: raises an error if another process owns the run; called before the marker.

        Raises:
          OSError: a file could not be uploaded.
        """
        files, directory = self.original(step), self._target.child(str(step))
        directory.upload(files.path, [name for name in files.files() if name != COMMIT_MARKER])
        check_owner()
        # Not every version of Orbax writes it on a disk too.
        (files.path / COMMIT_MARKER).touch()
        directory.upload(files.path, [COMMIT_MARKER])

    def original(self, step: int) -> LocalDirectory:
        """The local files of a checkpoint."""
        return LocalDirectory(self.directory / str(step))

    def discard(self, step: int) -> None:
        """Removes the local files of a checkpoint."""
        shutil.rmtree(self.original(step).path)

    def close(self) -> None:
        """Removes the scratch directory."""
        self._stack.close()
