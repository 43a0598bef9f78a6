"""Reading of a run's checkpoints: verified by their manifests, restored for any mesh."""

import dataclasses
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.cache import CarriedState
from megalodon_jax.carried_state import abstract_carried_state
from megalodon_jax.checkpoints.base_model import (
    BaseRecord,
    LoadBase,
    check_same_lora,
    record_from_json,
)
from megalodon_jax.checkpoints.compatibility import (
    GUARD_FORMAT,
    check_format,
    check_same_model,
    check_same_optimizer,
)
from megalodon_jax.checkpoints.directory import Directory, open_directory
from megalodon_jax.checkpoints.items import (
    abstract_by_name,
    from_names,
    reader,
    reason,
    suppress_orphaned_read_errors,
)
from megalodon_jax.checkpoints.manifest import Verification, has_all_parts, verify_checkpoint
from megalodon_jax.checkpoints.store_directory import S3Directory
from megalodon_jax.checkpoints.tokenizer_files import stored_tokenizer
from megalodon_jax.config import AnyModelConfig, TrainConfig, config_from_dict
from megalodon_jax.errors import (
    CheckpointError,
    ConfigError,
    IncompleteCheckpointError,
    MismatchError,
    StoreUnreachableError,
)
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.distributed import all_processes_ok, is_main
from megalodon_jax.parallel.sharding import with_shardings
from megalodon_jax.storage.location import AnyPath, as_path
from megalodon_jax.storage.scratch import scratch_directory
from megalodon_jax.train_state import (
    TrainState,
    abstract_run_model,
    abstract_state,
    join_params,
    resumed_state,
)

_TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"


class RestoredRun(NamedTuple):
    """A restored run.

    Attributes:
      state: the train state, sharded over the run's mesh; without the base of a run with LoRA.
      loader_state: for the loader's `load_state_dict`.
      config: the configuration that the checkpoint was saved with.
      base: the base of a run with LoRA; else None.
    """

    state: TrainState
    loader_state: dict[str, Any]
    config: TrainConfig
    base: BaseRecord | None


class _SavedRun(NamedTuple):
    """The JSON item `run` of a checkpoint."""

    config: TrainConfig
    fingerprint: str
    format: int
    tokenizer_file: object
    base: BaseRecord | None


class CheckpointReader:
    """The checkpoints of one run directory; every restore compares files with the manifest.

    Args:
      run_dir: the run's directory or URL.
      allow_unverified: also restore checkpoints without manifest, with a warning.

    Attributes:
      directory: path of the checkpoints.
      verification: number of files compared so far for the last restored checkpoint, their bytes,
        and the time; None before.
    """

    def __init__(self, run_dir: str | AnyPath, *, allow_unverified: bool = False) -> None:
        directory = as_path(run_dir) / "checkpoints"
        self.directory = directory.absolute() if isinstance(directory, Path) else directory
        self.verification: Verification | None = None
        self._files = open_directory(self.directory)
        self._allow_unverified = allow_unverified
        self._verified: dict[int, set[str]] = {}

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints in ascending order, damaged ones included."""
        # Orbax's list knows only what this process has seen.
        steps = sorted(int(name) for name in self._files.names() if name.isdigit())
        return [step for step in steps if self._is_committed(step)]

    def complete_steps(self) -> list[int]:
        """Steps of the checkpoints with a manifest, in ascending order; no content is compared."""
        return [step for step in self.steps() if has_all_parts(self.files_of(step).names())]

    def _is_committed(self, step: int) -> bool:
        marker = self._files.commit_marker
        if marker is None:
            return True
        names = self.files_of(step).names()
        # A run that was copied from a disk has no markers.
        return marker in names or has_all_parts(names)

    def _unfinished(self) -> list[str]:
        """Names of saves that were interrupted before their commit."""
        return [
            name
            for name in self._files.names()
            if name.endswith(_TEMPORARY_SUFFIX)
            or (name.isdigit() and not self._is_committed(int(name)))
        ]

    def files_of(self, step: int) -> Directory:
        """The directory of one checkpoint."""
        return self._files.child(str(step))

    def verify(self, step: int, items: Collection[str] | None = None) -> Verification:
        """Compares a checkpoint with its manifest; each process of several takes a share.

        Args:
          step: step of the checkpoint.
          items: names of the items whose content to compare; None: all.

        Raises:
          IncompleteCheckpointError: the checkpoint has no manifest.
          CheckpointError: the checkpoint is damaged; the message names the files.
        """
        result = verify_checkpoint(
            self.files_of(step),
            step,
            items=items,
            process=jax.process_index(),
            num_processes=jax.process_count(),
        )
        if result.problems:
            shown = "; ".join(result.problems[:3])
            more = len(result.problems) - 3
            raise CheckpointError(
                f"checkpoint {self._path(step)} is damaged: {shown}"
                f"{f'; and {more} more' if more > 0 else ''}"
            )
        return result

    def read_run(self, step: int) -> tuple[TrainConfig, str]:
        """Configuration and tokenizer fingerprint of one checkpoint.

        Raises:
          CheckpointError: the checkpoint is damaged or has another format.
        """
        run = self._read_run(step)
        return run.config, run.fingerprint

    def config_with_own_tokenizer(self, step: int) -> tuple[TrainConfig, str]:
        """Like `read_run`, with the tokenizer file inside the run if the checkpoint names one."""
        run = self._read_run(step)
        stored = stored_tokenizer(self.directory.parent, run.tokenizer_file)
        if stored is None:
            return run.config, run.fingerprint
        data = dataclasses.replace(run.config.data, tokenizer=stored)
        return dataclasses.replace(run.config, data=data), run.fingerprint

    def _read_run(self, step: int) -> _SavedRun:
        run = self._restore(step, run=ocp.args.JsonRestore())["run"]
        check_format(run.get("format"), self._path(step))
        try:
            return _SavedRun(
                config_from_dict(run["config"]),
                run["tokenizer_fingerprint"],
                run["format"],
                run.get("tokenizer_file"),
                record_from_json(run.get("base"), self._path(step)),
            )
        except (ConfigError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {self._path(step)} has no valid configuration: {error}"
            ) from error

    def restore(
        self,
        step: int,
        config: TrainConfig,
        mesh: Mesh | None = None,
        *,
        optimizer: optax.GradientTransformation | None = None,
    ) -> RestoredRun:
        """Restores the complete state of a run; the mesh that saved it does not matter.

        Args:
          step: step of the checkpoint.
          config: the resumed run.
          mesh: devices; None: those of `config.mesh`.
          optimizer: the run's own optimizer; None: that of `config.optim`.

        Raises:
          CheckpointError: the checkpoint is damaged.
          MismatchError: the checkpoint is of another model or optimizer; what differs is named.
        """
        run = self._read_run(step)
        saved, found = run.config, run.format
        check_same_model(saved.model, config.model, self._path(step))
        check_same_lora(saved.lora, config.lora, self._path(step))
        if optimizer is None:
            check_same_optimizer(saved.optim, config.optim, self._path(step))
        # The arrays as they were saved; the guard's window may have another length now.
        abstract = abstract_state(
            dataclasses.replace(config, spike_window=saved.spike_window), mesh, optimizer=optimizer
        )
        wanted: dict[str, ocp.args.CheckpointArgs] = {
            "params": ocp.args.StandardRestore(abstract_by_name(abstract.params)),
            "loader": ocp.args.JsonRestore(),
        }
        if has_state := bool(jax.tree.leaves(abstract.opt_state)):
            wanted["opt_state"] = ocp.args.StandardRestore(abstract_by_name(abstract.opt_state))
        if found >= GUARD_FORMAT:
            wanted["guard"] = ocp.args.StandardRestore(abstract_by_name(abstract.guard))
        if saved.optim.ema_decay and abstract.average is not None:
            wanted["average"] = ocp.args.StandardRestore(abstract_by_name(abstract.average))
        carried = _abstract_carried(saved, config, mesh)
        if carried is not None:
            wanted["carried"] = ocp.args.StandardRestore(abstract_by_name(carried))
        items = self._restore(step, **wanted)
        average = from_names(abstract.average, items["average"]) if "average" in wanted else None
        guard = from_names(abstract.guard, items["guard"]) if "guard" in wanted else None
        # Committed to devices like the other arrays: otherwise the train step compiles twice.
        step_array = np.asarray(step, np.int32)
        state = resumed_state(
            config,
            mesh,
            step=jax.make_array_from_callback((), abstract.step.sharding, lambda _: step_array),
            params=from_names(abstract.params, items["params"]),
            opt_state=from_names(abstract.opt_state, items["opt_state"] if has_state else {}),
            guard=guard,
            average=average,
            carried=None if carried is None else from_names(carried, items["carried"]),
        )
        return RestoredRun(state, items["loader"], saved, run.base)

    def restore_model(
        self,
        step: int,
        config: AnyModelConfig,
        mesh: Mesh | None = None,
        *,
        load_base: LoadBase | None = None,
    ) -> LanguageModel:
        """Restores the parameters only, as a model; of a run with LoRA with its factors.

        Args:
          step: step of the checkpoint.
          config: the model's configuration.
          mesh: devices over which the parameters are sharded; None: this process's first device.
          load_base: reads the base of a run with LoRA.

        Of a run with `optim.ema_decay` these are the averaged parameters.

        Raises:
          CheckpointError: the checkpoint is damaged.
          MismatchError: the run has LoRA factors, and `load_base` is missing or finds another base.
        """
        run = self._read_run(step)
        if not run.config.lora.rank:
            graphdef, params = abstract_model(config)
            if mesh is not None:
                params = with_shardings(params, mesh)
            return nnx.merge(graphdef, self._restore_evaluated(step, run.config, params))
        if load_base is None or run.base is None:
            raise MismatchError(
                f"checkpoint {self._path(step)} has LoRA factors without their base; read it with "
                "megalodon_jax.load, or write the merged model with megalodon convert --merge"
            )
        adapted = abstract_run_model(dataclasses.replace(run.config, model=config))
        params = adapted.params if mesh is None else with_shardings(adapted.params, mesh)
        factors = self._restore_evaluated(step, run.config, params)
        base = load_base(run.base, run.config, mesh)
        return nnx.merge(adapted.graphdef, join_params(factors, base))

    def _restore_evaluated(self, step: int, saved: TrainConfig, params: nnx.State) -> nnx.State:
        """The average of the parameters if the run has one, else the parameters."""
        name = "average" if saved.optim.ema_decay else "params"
        wanted = {name: ocp.args.StandardRestore(abstract_by_name(params))}
        return from_names(params, self._restore(step, **wanted)[name])

    def _restore(self, step: int, **items: ocp.args.CheckpointArgs) -> Mapping[str, Any]:
        restored, error = None, None
        try:
            self._verify_once(step, items)
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

    def _verify_once(self, step: int, items: Collection[str]) -> None:
        """Verifies the items that have not been compared since these checkpoints were opened."""
        verified = self._verified.setdefault(step, set())
        if verified >= set(items):
            return
        try:
            new = self.verify(step, set(items) - verified)
        except IncompleteCheckpointError:
            if not self._allow_unverified:
                raise
            if is_main() and not verified:
                print(
                    f"warning: checkpoint {self._path(step)} has no manifest, so that damage in "
                    "it cannot be found",
                    file=sys.stderr,
                )
        else:
            total = self.verification if verified and self.verification else Verification.empty()
            self.verification = total + new
        verified.update(items)

    def _read(self, step: int, items: dict[str, ocp.args.CheckpointArgs]) -> Mapping[str, Any]:
        try:
            with (
                suppress_orphaned_read_errors(),
                self._readable(step, items) as directory,
                reader() as orbax,
            ):
                restored = orbax.restore(directory / str(step), args=ocp.args.Composite(**items))
            missing = [name for name in items if restored[name] is None]
        # Orbax, TensorStore and JSON raise various types for truncated or missing files.
        except Exception as error:
            # In a store all objects have just been listed with their checksums.
            is_store = self._files.commit_marker is not None
            kind = StoreUnreachableError if is_store else CheckpointError
            raise kind(f"checkpoint {self._path(step)} cannot be read: {reason(error)}") from error
        if missing:
            raise CheckpointError(f"checkpoint {self._path(step)} lacks {', '.join(missing)}")
        return restored  # type: ignore[return-value]

    @contextmanager
    def _readable(self, step: int, items: Collection[str]) -> Iterator[AnyPath]:
        """A directory of checkpoints from which Orbax can read; on s3:// a copy of the items."""
        if not isinstance(self._files, S3Directory):
            yield self.directory
            return
        names = [
            f"{step}/{name}"
            for name in self.files_of(step).files()
            if "/" not in name or name.split("/")[0] in items
        ]
        with scratch_directory() as copy:
            self._files.download(copy, names)
            yield copy

    def _path(self, step: int) -> AnyPath:
        return self.directory / str(step)


def _abstract_carried(
    saved: TrainConfig, config: TrainConfig, mesh: Mesh | None
) -> CarriedState | None:
    """The saved state of the rows, in the layout that it was saved in; None if rows start anew."""
    is_same = saved.data.carry_state and saved.data.batch_size == config.data.batch_size
    if not (is_same and config.data.carry_state):
        return None
    model = dataclasses.replace(config.model, scan_layers=saved.model.scan_layers)
    return abstract_carried_state(dataclasses.replace(config, model=model), mesh)
