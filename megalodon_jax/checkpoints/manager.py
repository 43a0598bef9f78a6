"""Checkpoints of a run: its complete state, so that a resumed run equals an uninterrupted one.

`<run_dir>/checkpoints/<step>/` has four Orbax items: `params` and `opt_state` (arrays by dotted
name), `loader` (the data loader's state, JSON) and `run` (step, resolved configuration, tokenizer
fingerprint and format number, JSON). A directory gets its final name when it is complete.

In a multi-process run all processes save and restore together in a shared directory. Each process
writes and reads the shards of its own devices, and a checkpoint restores with any number of
processes and devices.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.checkpoints.compatibility import FORMAT, check_format, check_same_model
from megalodon_jax.checkpoints.items import (
    abstract_by_name,
    by_name,
    from_names,
    reader,
    reason,
    suppress_orphaned_read_errors,
)
from megalodon_jax.config import AnyModelConfig, TrainConfig, config_from_dict
from megalodon_jax.errors import CheckpointError, ConfigError
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.distributed import all_processes_ok, is_main
from megalodon_jax.train_state import TrainState, abstract_state


class RestoredRun(NamedTuple):
    """A restored run.

    Attributes:
      state: the train state, sharded over the run's mesh.
      loader_state: for the loader's `load_state_dict`.
      config: the configuration that the checkpoint was saved with.
    """

    state: TrainState
    loader_state: dict[str, Any]
    config: TrainConfig


class RunCheckpoints:
    """The checkpoints of one run directory; saving is asynchronous.

    Use as a context manager, or call `close`.

    Args:
      run_dir: the run's directory.
      keep: number of newest checkpoints to keep; older ones are deleted after a save completes.
      read_only: write and delete nothing.

    Raises:
      CheckpointError: `read_only`, and the directory has no checkpoints.
    """

    def __init__(self, run_dir: str | Path, *, keep: int = 1, read_only: bool = False) -> None:
        self.directory = (Path(run_dir) / "checkpoints").absolute()
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        elif not self.directory.is_dir():
            raise CheckpointError(
                f"{run_dir} has no checkpoints; give the run_dir of a training run"
            )
        if is_main():
            for unfinished in sorted(self.directory.glob("*.orbax-checkpoint-tmp")):
                action = "ignoring" if read_only else "removing"
                print(f"{action} unfinished checkpoint {unfinished}", file=sys.stderr)
        self._orbax = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                read_only=read_only,
                create=False,
                cleanup_tmp_directories=not read_only,
            ),
        )
        self._last_saved: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk in ascending order, damaged ones included."""
        # Orbax's list drops an old step when a save starts, not when it completes.
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

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
        self._save(
            int(state.step),
            params=ocp.args.StandardSave(by_name(state.params)),
            opt_state=ocp.args.StandardSave(by_name(state.opt_state)),
            loader=ocp.args.JsonSave(dict(loader_state)),
            run=_run_item(int(state.step), config, tokenizer_fingerprint),
        )

    def save_params(
        self, params: nnx.State, *, config: TrainConfig, tokenizer_fingerprint: str
    ) -> None:
        """Starts an asynchronous save of the parameters only, as step 0; it cannot be resumed.

        Raises:
          CheckpointError: the save failed.
        """
        self._save(
            0,
            params=ocp.args.StandardSave(by_name(params)),
            run=_run_item(0, config, tokenizer_fingerprint),
        )

    def check(self) -> None:
        """Raises `CheckpointError` if the last save has failed; does not wait for it."""
        try:
            self._orbax.check_for_errors()
        except Exception as error:
            raise self._save_error(self._last_saved, error) from error

    def wait(self) -> None:
        """Waits for the last save to complete.

        Raises:
          CheckpointError: the save failed.
        """
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            raise self._save_error(self._last_saved, error) from error

    def close(self) -> None:
        """Waits for the last save and stops the writer threads."""
        try:
            self._orbax.close()
        except Exception as error:
            raise self._save_error(self._last_saved, error) from error

    def read_run(self, step: int) -> tuple[TrainConfig, str]:
        """Configuration and tokenizer fingerprint of one checkpoint.

        Raises:
          CheckpointError: the checkpoint is damaged or has another format.
        """
        run = self._restore(step, run=ocp.args.JsonRestore())["run"]
        check_format(run.get("format"), self._path(step))
        try:
            return config_from_dict(run["config"]), run["tokenizer_fingerprint"]
        except (ConfigError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {self._path(step)} has no valid configuration: {error}"
            ) from error

    def restore(self, step: int, config: TrainConfig, mesh: Mesh | None = None) -> RestoredRun:
        """Restores the complete state of a run; the mesh that saved it does not matter.

        Args:
          step: step of the checkpoint.
          config: the resumed run.
          mesh: devices; None: those of `config.mesh`.

        Raises:
          CheckpointError: the checkpoint is damaged.
          MismatchError: the checkpoint is of another model; the differing fields are named.
        """
        saved, _ = self.read_run(step)
        check_same_model(saved.model, config.model, self._path(step))
        abstract = abstract_state(config, mesh)
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract_by_name(abstract.params)),
            opt_state=ocp.args.StandardRestore(abstract_by_name(abstract.opt_state)),
            loader=ocp.args.JsonRestore(),
        )
        # Committed to devices like the other arrays: otherwise the train step compiles twice.
        step_array = np.asarray(step, np.int32)
        state = TrainState(
            jax.make_array_from_callback((), abstract.step.sharding, lambda _: step_array),
            from_names(abstract.params, items["params"]),
            from_names(abstract.opt_state, items["opt_state"]),
        )
        return RestoredRun(state, items["loader"], saved)

    def restore_params(self, step: int, config: TrainConfig, mesh: Mesh | None = None) -> nnx.State:
        """Restores the parameters only, sharded for a run of `config`.

        Args:
          step: step of the checkpoint.
          config: the run that starts from these parameters.
          mesh: devices; None: those of `config.mesh`.

        Raises:
          CheckpointError: the checkpoint is damaged.
          MismatchError: the checkpoint is of another model; the differing fields are named.
        """
        saved, _ = self.read_run(step)
        check_same_model(saved.model, config.model, self._path(step))
        params = abstract_state(config, mesh).params
        items = self._restore(step, params=ocp.args.StandardRestore(abstract_by_name(params)))
        return from_names(params, items["params"])

    def restore_model(self, step: int, config: AnyModelConfig) -> LanguageModel:
        """Restores the parameters only, as a model on this process's first device.

        Raises:
          CheckpointError: the checkpoint is damaged.
        """
        graphdef, params = abstract_model(config)
        items = self._restore(step, params=ocp.args.StandardRestore(abstract_by_name(params)))
        return nnx.merge(graphdef, from_names(params, items["params"]))

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint to `damaged_<step>`, which frees the name of its step."""
        source = self._path(step)
        target = source.with_name(f"damaged_{step}")
        count = 1
        while target.exists():
            count += 1
            target = source.with_name(f"damaged_{step}_{count}")
        # Barrier: all processes choose the target before one renames.
        all_processes_ok(True)
        if is_main():
            source.rename(target)
        all_processes_ok(True)
        self._orbax.reload()
        return target

    def _save(self, step: int, **items: ocp.args.CheckpointArgs) -> None:
        # Orbax would wait too, but then its error would name the wrong step.
        self.wait()
        try:
            self._orbax.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._save_error(step, error) from error
        self._last_saved = step

    def _restore(self, step: int, **items: ocp.args.CheckpointArgs) -> Mapping[str, Any]:
        restored, error = None, None
        try:
            restored = self._read(step, items)
        except CheckpointError as caught:
            error = caught
        # All processes reject a checkpoint that one of them cannot read.
        all_read = all_processes_ok(error is None)
        if error is not None:
            raise error
        if restored is None or not all_read:
            raise CheckpointError(
                f"checkpoint {self._path(step)} cannot be read by another process; see its log"
            )
        return restored

    def _read(self, step: int, items: dict[str, ocp.args.CheckpointArgs]) -> Mapping[str, Any]:
        try:
            with suppress_orphaned_read_errors(), reader(self.directory) as orbax:
                restored = orbax.restore(step, args=ocp.args.Composite(**items))
            missing = [name for name in items if restored[name] is None]
        # Orbax, TensorStore and JSON raise various types for truncated or missing files.
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self._path(step)} cannot be read: {reason(error)}"
            ) from error
        if missing:
            raise CheckpointError(f"checkpoint {self._path(step)} lacks {', '.join(missing)}")
        return restored  # type: ignore[return-value]

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _save_error(self, step: int | None, error: Exception) -> CheckpointError:
        complete = [str(saved) for saved in self.steps() if saved != step]
        usable = (
            f"still usable: step {', '.join(complete)}"
            if complete
            else "there is no other checkpoint"
        )
        return CheckpointError(
            f"checkpoint {'' if step is None else self._path(step)} was not written: "
            f"{reason(error)}; {usable}"
        )


def _run_item(step: int, config: TrainConfig, tokenizer_fingerprint: str) -> ocp.args.JsonSave:
    return ocp.args.JsonSave(
        {
            "format": FORMAT,
            "step": step,
            "config": dataclasses.asdict(config),
            "tokenizer_fingerprint": tokenizer_fingerprint,
        }
    )
