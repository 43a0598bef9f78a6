"""Checkpoints of a run: its complete state, so that a resumed run equals an uninterrupted one.

`<run_dir>/checkpoints/<step>/` has five Orbax items: `params`, `opt_state` and `guard` (arrays by
dotted name), `loader` (the data loader's state, JSON) and `run` (step, resolved configuration,
tokenizer fingerprint and format number, JSON); with `optim.ema_decay` also `average`, with
`data.carry_state` also `carried`. A directory gets its final name when it is complete; then its
manifest is written (`manifest`), with which every restore compares the files. While checkpoints are
open for writing, this process owns the run directory (`lock`). In an object store a checkpoint is
complete with its commit marker (`store_directory`): Orbax writes to gs:// itself; for s3:// it
writes to a scratch directory, from which the files are uploaded.

In a multi-process run all processes save and restore together in a shared directory. Each process
writes and reads the shards of its own devices, and a checkpoint restores with any number of
processes and devices.
"""

import contextlib
import dataclasses
import itertools
import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from flax import nnx

from megalodon_jax.checkpoints.base_model import BaseRecord
from megalodon_jax.checkpoints.compatibility import FORMAT
from megalodon_jax.checkpoints.directory import open_directory
from megalodon_jax.checkpoints.items import filter_orphaned_errors, reason
from megalodon_jax.checkpoints.lock import STALE_SECONDS, RunLock
from megalodon_jax.checkpoints.manifest import remove_checkpoint, write_manifest
from megalodon_jax.checkpoints.pending_save import PendingSave, make_barrier
from megalodon_jax.checkpoints.reading import CheckpointReader
from megalodon_jax.checkpoints.retention import HeldoutLosses, steps_to_remove
from megalodon_jax.checkpoints.store_directory import S3Directory
from megalodon_jax.checkpoints.tokenizer_files import relative_path, write_tokenizer
from megalodon_jax.checkpoints.upload import Upload
from megalodon_jax.config import TrainConfig
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.errors import CheckpointError, ConfigError, RunLockedError
from megalodon_jax.parallel.distributed import all_gather_json, all_processes_ok, is_main
from megalodon_jax.parallel.failures import (
    barrier_outside_devices,
    exit_without_threads,
    failure_elsewhere,
)
from megalodon_jax.parameter_names import by_name
from megalodon_jax.storage.location import AnyPath
from megalodon_jax.train_state import TrainState

_BARRIERS = itertools.count()


class RunCheckpoints(CheckpointReader):
    """The checkpoints of one run directory; saving is asynchronous.

    Use as a context manager, or call `close`. Until then this process, or process 0 of several,
    owns the run directory, unless `read_only`.

    Args:
      run_dir: the run's directory or URL.
      keep: number of newest checkpoints to keep. Older ones are deleted when a later loss of a
        newer one is finite (`confirm`), not when it is saved.
      keep_every: keep every checkpoint whose step is a multiple of it; 0: none.
      read_only: write and delete nothing.
      allow_unverified: also restore checkpoints without manifest, with a warning.
      before_manifest: called in process 0 before a checkpoint becomes complete.

    Raises:
      RunLockedError: another process owns the directory.
      CheckpointError: `read_only`, and the directory has no checkpoints; or it cannot be written.
      ConfigError: several processes would write to s3://.
    """

    def __init__(
        self,
        run_dir: str | AnyPath,
        *,
        keep: int = 1,
        keep_every: int = 0,
        read_only: bool = False,
        allow_unverified: bool = False,
        before_manifest: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(run_dir, allow_unverified=allow_unverified)
        self._keep, self._keep_every = keep, keep_every
        self._pending: PendingSave | None = None
        self._removing: threading.Thread | None = None
        self._confirmed = -1
        self._failed = False
        self._before_manifest = before_manifest
        self._tokenizer_file: str | None = None
        self._base: BaseRecord | None = None
        # Saved steps that no loss has confirmed yet; -1 stands for those of earlier starts.
        self._unconfirmed = {-1}
        self._lock, self._orbax, self._upload = None, None, None
        if read_only:
            self._open_read_only(run_dir)
            return
        if isinstance(self._files, S3Directory) and jax.process_count() > 1:
            raise ConfigError(
                f"run_dir {run_dir} is on s3://, which only runs of one process can write; use "
                "gs:// or a shared file system for several processes"
            )
        # Before Orbax opens the directory, which removes saves in progress.
        self._lock = _lock_run(run_dir)
        try:
            self._files.make()
            self._remove_unfinished()
            self._heldout = HeldoutLosses(self._files)
            self._orbax = self._open()
            self._remove_filter = filter_orphaned_errors()
        except OSError as error:
            self._release()
            raise CheckpointError(f"cannot open {self.directory}: {reason(error)}") from error
        except BaseException:
            self._release()
            raise

    def _open_read_only(self, run_dir: str | AnyPath) -> None:
        try:
            exists = self._files.exists()
            unfinished = self._unfinished()
        except OSError as error:
            raise CheckpointError(f"cannot read {run_dir}: {reason(error)}") from error
        if not exists:
            raise CheckpointError(
                f"{run_dir} has no checkpoints; give the run_dir of a training run"
            )
        self._report_unfinished("ignoring", unfinished)

    def _report_unfinished(self, action: str, names: list[str]) -> None:
        if is_main():
            for name in names:
                print(f"{action} unfinished checkpoint {self.directory / name}", file=sys.stderr)

    def _remove_unfinished(self) -> None:
        names = self._unfinished()
        self._report_unfinished("removing", names)
        if is_main():
            for name in names:
                self._files.remove_tree(name)
        # Barrier: the other processes open the directory afterwards.
        all_processes_ok(True)

    def _open(self) -> ocp.CheckpointManager:
        if isinstance(self._files, S3Directory):
            self._upload = Upload(self._files)
        return ocp.CheckpointManager(
            self.directory if self._upload is None else self._upload.directory,
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=True,
                # Orbax would delete at the save; `confirm` deletes after a later finite loss.
                preservation_policy=ocp.checkpoint_managers.LatestN(n=None),
                async_options=ocp.AsyncOptions(
                    barrier_sync_fn=make_barrier() if jax.process_count() > 1 else None,
                    # Called in process 0 just before the checkpoint gets its final name.
                    post_finalization_callback=self._check_lock,
                    # Created in a thread, a directory that cannot be created makes the writer
                    # threads wait 300 s for it, also at the end of the process.
                    create_directories_asynchronously=False,
                ),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Writes a tokenizer's files into the run; the checkpoints from now on refer to them.

        Raises:
          CheckpointError: they cannot be written.
        """
        self._tokenizer_file = relative_path(tokenizer)
        if is_main():
            write_tokenizer(open_directory(self.directory.parent), tokenizer)

    def keep_base(self, base: BaseRecord) -> None:
        """Records the base of a run with LoRA in the checkpoints from now on."""
        self._base = base

    def save(
        self,
        state: TrainState,
        *,
        loader_state: Mapping[str, Any],
        config: TrainConfig,
        tokenizer_fingerprint: str,
    ) -> None:
        """Starts an asynchronous save; the arrays may be donated after it returns.

        Raises:
          CheckpointError: this or the previous save failed (for example: disk full).
        """
        items = {
            name: by_name(getattr(state, name))
            for name in ("params", "opt_state", "guard", "average", "carried")
        }
        # Orbax saves no empty item: a run may have no average, an optimizer no state.
        self._save(
            int(state.step),
            **{name: ocp.args.StandardSave(arrays) for name, arrays in items.items() if arrays},
            loader=ocp.args.JsonSave(dict(loader_state)),
            run=self._run_item(int(state.step), config, tokenizer_fingerprint),
        )

    def save_params(
        self, params: nnx.State, *, config: TrainConfig, tokenizer_fingerprint: str
    ) -> None:
        """Starts an asynchronous save of the parameters only, as step 0; it cannot be resumed.

        Raises:
          CheckpointError: the save failed.
        """
        optim = dataclasses.replace(config.optim, ema_decay=0.0)
        without_average = dataclasses.replace(config, optim=optim)
        self._save(
            0,
            params=ocp.args.StandardSave(by_name(params)),
            run=self._run_item(0, without_average, tokenizer_fingerprint),
        )

    def check(self) -> None:
        """Raises an error if the last save has failed; does not wait for it.

        Raises:
          CheckpointError: the save failed, in this process or in another one of the run.
          RunLockedError: another process has taken the run directory over.
        """
        pending = self._pending
        if pending is not None and not pending.is_running():
            self._pending = None
            if pending.error is not None:
                raise self._save_error(pending.step, pending.error) from pending.error
        if (failure := failure_elsewhere()) is not None:
            self._failed = True
            raise CheckpointError(f"{failure}; {self._usable(None)}")
        self.check_owner(read=not self._files.is_remote)

    def wait(self) -> None:
        """Waits for the last save to complete.

        Raises:
          CheckpointError: the save failed, in this process or in another one of the run.
          RunLockedError: another process has taken the run directory over.
        """
        if self._pending is not None:
            self._pending.wait()
        self.check()

    def confirm(self, step: int) -> None:
        """Says that the parameters after `step` updates, and all earlier ones, gave finite losses.

        Checkpoints up to this step may then replace older ones, which are deleted in the
        background. The newest `keep`, the best by held-out loss and those of `keep_every` stay.
        """
        self._confirmed = max(step, self._confirmed)
        is_idle = self._removing is None or not self._removing.is_alive()
        if is_main() and is_idle and min(self._unconfirmed, default=step + 1) <= self._confirmed:
            self._removing = threading.Thread(
                target=self._remove_old, name="remove_checkpoints", daemon=True
            )
            self._removing.start()

    def _remove_old(self) -> None:
        """Removes what is confirmed and not kept; a checkpoint too many does not stop the run."""
        self._unconfirmed -= {step for step in self._unconfirmed if step <= self._confirmed}
        try:
            for step in self._old_steps():
                self._check_lock()
                remove_checkpoint(self._files, step)
        except (OSError, RunLockedError) as error:
            # Tried again after the next save.
            print(f"cannot remove from {self.directory}: {reason(error)}", file=sys.stderr)

    def _old_steps(self) -> list[int]:
        steps = self.steps()
        complete = self.complete_steps()
        return steps_to_remove(
            steps,
            complete=complete,
            confirmed=self._confirmed,
            keep=self._keep,
            keep_every=self._keep_every,
            best=self._heldout.best(complete),
        )

    def report_heldout(self, step: int, loss: float) -> None:
        """Records the held-out loss of the parameters after `step` updates.

        The checkpoint of the lowest loss is kept; the losses survive a resume.

        Args:
          step: number of updates; counts if a checkpoint of this step is saved.
          loss: nats per token.
        """
        if not is_main():
            return
        try:
            self._heldout.add(step, loss, steps=self.steps())
        except OSError as error:
            raise CheckpointError(
                f"the held-out loss cannot be written to {self.directory}: {reason(error)}"
            ) from error

    def best_step(self) -> int | None:
        """The complete checkpoint with the lowest held-out loss; None: none has one."""
        return HeldoutLosses(self._files).best(self.complete_steps())

    def close(self) -> None:
        """Waits for the last save, stops the writer threads and releases the run directory."""
        try:
            if not self._failed:
                self.wait()
                self._finish_removal()
        finally:
            self._close_orbax()
            self._release()

    def set_aside(self, step: int, *, prefix: str = "damaged") -> AnyPath:
        """Renames a checkpoint to `<prefix>_<step>`, which frees the name of its step."""
        names = self._files.names()
        numbered = (f"{prefix}_{step}_{count}" for count in itertools.count(2))
        target = next(
            name for name in itertools.chain([f"{prefix}_{step}"], numbered) if name not in names
        )
        # Barrier: all processes choose the target before one renames.
        all_processes_ok(True)
        if is_main():
            self._check_lock()
            self._files.move(str(step), target)
        all_processes_ok(True)
        self._writer().reload()
        self._verified.pop(step, None)
        return self.directory / target

    def set_aside_after(self, step: int) -> list[AnyPath]:
        """Renames all checkpoints of later steps to `later_<step>`, so that `step` is the newest.

        Returns:
          Their new paths.
        """
        self._heldout.forget_after(step)
        return [self.set_aside(at, prefix="later") for at in self.steps() if at > step]

    def _save(self, step: int, **items: ocp.args.CheckpointArgs) -> None:
        # Orbax would wait too, but then its error would name the wrong step.
        self.wait()
        self.check_owner()
        try:
            self._writer().save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._save_error(step, error) from error
        self._pending = PendingSave(step, lambda: self._finish_save(step))

    def _run_item(
        self, step: int, config: TrainConfig, tokenizer_fingerprint: str
    ) -> ocp.args.JsonSave:
        item = {
            "format": FORMAT,
            "step": step,
            "config": dataclasses.asdict(config),
            "tokenizer_fingerprint": tokenizer_fingerprint,
        }
        if self._tokenizer_file is not None:
            item["tokenizer_file"] = self._tokenizer_file
        if self._base is not None:
            item["base"] = self._base._asdict()
        return ocp.args.JsonSave(item)

    def _finish_save(self, step: int) -> None:
        self._writer().wait_until_finished()
        if self._upload is not None:
            self._upload.run(step, check_owner=self._check_lock)
        self._check_lock()
        if self._before_manifest is not None and is_main():
            self._before_manifest()
        write_manifest(
            self.files_of(step),
            step,
            process=jax.process_index(),
            num_processes=jax.process_count(),
            uploaded_from=None if self._upload is None else self._upload.original(step),
        )
        if self._upload is not None:
            self._upload.discard(step)
            self._writer().reload()
        self._unconfirmed.add(step)

    def _finish_removal(self) -> None:
        """Removes what was confirmed while another removal ran."""
        if self._removing is not None:
            self._removing.join()
            self._remove_old()

    def check_owner(self, *, read: bool = True) -> None:
        """Raises `RunLockedError` if another process has taken the run directory over.

        Args:
          read: read the lock now; False: say what the last heartbeat found.
        """
        if self._lock is not None:
            try:
                self._lock.check(read=read)
            except RunLockedError:
                self._failed = True
                raise

    def _check_lock(self) -> None:
        self.check_owner()

    def _writer(self) -> ocp.CheckpointManager:
        if self._orbax is None:
            raise ValueError("the checkpoints were opened with read_only=True")
        return self._orbax

    def _close_orbax(self) -> None:
        if self._orbax is None:
            return
        if not self._failed:
            self._orbax.close()
            self._remove_filter()
            return
        # The errors of a failed save have been raised, and its threads may wait for minutes.
        closing = threading.Thread(target=_close_quietly, args=(self._orbax,), daemon=True)
        closing.start()
        closing.join(1.0)
        if closing.is_alive():
            exit_without_threads(1)

    def _release(self) -> None:
        if self._upload is not None:
            self._upload.close()
        if self._lock is not None:
            self._lock.release()

    def _save_error(self, step: int, error: Exception) -> CheckpointError | RunLockedError:
        self._failed = True
        try:
            self._check_lock()
        except RunLockedError as lost:
            return lost
        return CheckpointError(
            f"checkpoint {self._path(step)} was not written: {reason(error)}; {self._usable(step)}"
        )

    def _usable(self, failed: int | None) -> str:
        try:
            usable = [at for at in self.complete_steps() if at != failed]
        except OSError:
            return f"{self.directory} cannot be read"
        if not usable:
            return "there is no other checkpoint"
        return f"still usable: step {', '.join(map(str, usable))}"


def _lock_run(run_dir: str | AnyPath) -> RunLock | None:
    """The lock of a run, which process 0 holds for all processes; None in the others.

    Raises:
      RunLockedError: another run owns the directory.
      CheckpointError: the directory cannot be written.
    """
    if jax.process_count() == 1:
        return RunLock(run_dir)
    lock, refusal = None, ""
    if is_main():
        try:
            lock = RunLock(run_dir)
        except (RunLockedError, CheckpointError) as error:
            refusal = str(error)
    # A collective of devices may time out earlier than a lock becomes stale.
    barrier_outside_devices(f"run_lock_{next(_BARRIERS)}", seconds=2 * STALE_SECONDS)
    refusal = all_gather_json(refusal)[0]
    if refusal:
        raise RunLockedError(refusal)
    return lock


def _close_quietly(orbax: ocp.CheckpointManager) -> None:
    with contextlib.suppress(Exception):
        orbax.close()
