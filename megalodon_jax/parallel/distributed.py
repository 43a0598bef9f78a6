"""Multi-process runs: initialization, the rows of each process, and collectives of host values.

Every process runs the same program on its own devices (`jax.distributed`); the mesh spans the
devices of all processes. A process loads the complete rows of its devices, and each device gets its
sequence shard of them. In a single process every function here is free.
"""

import atexit
import bisect
import importlib.util
import json
import math
import os
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.config import ProcessesConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.parallel.sharding import batch_sharding
from megalodon_jax.typing import Batch

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_METADATA_SECONDS = 5.0


def initialize(config: ProcessesConfig) -> None:
    """Initializes `jax.distributed` if the run has several processes.

    Call it before any computation; a second call does nothing. The processes are those of
    `coordinator`, `count` and `index`; else, with `detect`, those that JAX detects on a TPU pod,
    under SLURM or under Open MPI; else the run has one process.

    Raises:
      ConfigError: this process cannot join the others.
    """
    if jax.distributed.is_initialized():
        return
    # Its handler of SIGTERM would replace the run's own (`training.signals`).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if config.coordinator:
            jax.distributed.initialize(
                config.coordinator,
                config.count,
                config.index,
                # With detection a process under SLURM would get only one of its GPUs.
                cluster_detection_method="deactivate",
            )
        elif config.detect and is_multi_process_environment(os.environ):
            jax.distributed.initialize()
    # ValueError: incomplete environment. RuntimeError: no connection, or JAX is already in use.
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot join the other processes: {error}; set processes.coordinator, "
            "processes.count and processes.index, or set processes.detect to false to run in one "
            "process"
        ) from error


def exit_without_barrier(exit_code: int) -> None:
    """After an error in a multi-process run: skips the barrier at exit.

    The other processes may wait in a collective of this one. They stop when its connections close,
    or at the latest when its heartbeat times out.
    """

    def exit_now() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    # Handlers run in reverse order, so this one runs before JAX's barrier.
    if jax.distributed.is_initialized():
        atexit.register(exit_now)


def is_multi_process_environment(environment: Mapping[str, str]) -> bool:
    """Whether the environment variables of a launcher describe several processes.

    Reads those of SLURM (`srun`), Open MPI (`mpirun`) and TPU pods; a TPU host without variables
    queries its metadata server, as JAX does.
    """
    # A SLURM batch script has SLURM_NTASKS too, but is not a task itself.
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        return int(environment.get("SLURM_NTASKS", "1")) > 1
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True
    if environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if hosts := environment.get(name):
            return "," in hosts
    # JAX sets this variable if it finds no TPU.
    if "TPU_SKIP_MDS_QUERY" in environment or importlib.util.find_spec("libtpu") is None:
        return False
    return "tpu" in environment.get("JAX_PLATFORMS", "tpu") and "," in _tpu_hosts()


def _tpu_hosts() -> str:
    request = urllib.request.Request(
        _METADATA + "worker-network-endpoints", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as response:
            return response.read().decode()
    except OSError:
        # No metadata server: not a Google Cloud host.
        return ""


def is_main() -> bool:
    """Whether this is process 0, which writes logs and prints."""
    return jax.process_index() == 0


def rows_of_processes(mesh: Mesh, batch_size: int) -> dict[int, tuple[int, ...]]:
    """The rows of the global batch that each process's devices hold, in ascending order.

    The rows of a process may be non-contiguous: a mesh that follows the topology of a TPU pod can
    assign rows 0, 1, 4 and 5 to one process.

    Args:
      mesh: the run's devices.
      batch_size: rows of the global batch.
    """
    # Any length that divides by the sequence shards gives the same rows.
    shape = (batch_size, mesh.shape["chunk"])
    held: dict[int, set[int]] = {}
    for device, (rows, _) in batch_sharding(mesh).devices_indices_map(shape).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(batch_size)))
    return {process: tuple(sorted(rows)) for process, rows in sorted(held.items())}


def rows_of_process(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """The rows of the global batch that this process loads.

    Raises:
      ConfigError: the mesh has no device of this process.
    """
    rows = rows_of_processes(mesh, batch_size)
    if jax.process_index() not in rows:
        raise ConfigError(
            f"the mesh has {mesh.size} devices and none of process {jax.process_index()}; set one "
            "axis of [mesh] to -1 to use the devices of all processes"
        )
    return rows[jax.process_index()]


def num_shards_of(mesh: Mesh, batch_size: int) -> int:
    """The smallest number of equal data shards whose rows belong to the same set of processes.

    A document is then read by one process only, unless processes share rows.
    """
    rows = rows_of_processes(mesh, batch_size)
    holders = [{process for process in rows if row in rows[process]} for row in range(batch_size)]
    boundaries = [row for row in range(1, batch_size) if holders[row] != holders[row - 1]]
    return batch_size // math.gcd(batch_size, *boundaries)


def place_batch(batch: Batch, mesh: Mesh, *, rows: Sequence[int], batch_size: int) -> Batch:
    """Places the rows of this process on the mesh as a sharded global batch.

    Args:
      batch: numpy arrays (..., b, L) with equal leading axes: the rows `rows` of the global batch,
        each with all L tokens; values of encoders are (..., b, L, c).
      mesh: the run's devices.
      rows: from `rows_of_process`.
      batch_size: rows B of the global batch.

    Returns:
      Global arrays (..., B, L).
    """
    num_leading = batch.targets.ndim - 2

    def place_on_mesh(array: np.ndarray) -> jax.Array:
        leading, tail = array.shape[:num_leading], array.shape[num_leading + 1 :]
        sharding = batch_sharding(mesh, leading=len(leading))

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[num_leading].indices(batch_size)
            # The rows of a device are contiguous, also within the rows of its process.
            first = bisect.bisect_left(rows, start)
            own = slice(first, first + stop - start)
            return array[*index[:num_leading], own, *index[num_leading + 1 :]]

        return jax.make_array_from_callback((*leading, batch_size, *tail), sharding, shard)

    return jax.tree.map(place_on_mesh, batch)


def all_gather_json(value: Any) -> list[Any]:
    """All-gathers one JSON value per process, in process order; every process must call it."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(own), np.int32))
    padded = np.pad(own, (0, int(sizes.max()) - len(own)))
    gathered = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(gathered, sizes.ravel(), strict=True)
    ]


def all_processes_ok(ok: bool) -> bool:
    """Whether `ok` is true in all processes; every process must call it, so it is a barrier too."""
    return all(all_gather_json(ok))


class DelayedGlobalMax:
    """The maximum over processes of one number per step, available one step later.

    The delay avoids a host synchronization: devices compute the maximum after the current step, and
    it is read after the next step has been dispatched. In a single process there is no delay.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._shape = (mesh.size,)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._maximum = jax.jit(
            lambda values: values.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._placed: dict[int, jax.Array] = {}
        self._pending: jax.Array | None = None

    def exchange(self, number: int) -> int:
        """Contributes this step's number (0 or more); returns the maximum of the previous step.

        Every process must call it once per step. The first call returns 0.
        """
        if jax.process_count() == 1:
            return number
        if number not in self._placed:
            value = np.full(1, number, np.int32)
            self._placed[number] = jax.make_array_from_callback(
                self._shape, self._sharding, lambda _: value
            )
        previous, self._pending = self._pending, self._maximum(self._placed[number])
        return 0 if previous is None else int(previous)
