"""Runs of several processes: how they find one another, and which rows each of them loads.

Every process runs the same program on its own devices (`jax.distributed`); the mesh is over the
devices of all. A process loads the rows that its devices hold, whole, and each device gets its part
of them. In one process nothing here costs anything.
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
    """Joins the other processes of the run, if there are any; must come before any computation.

    With `coordinator`, `count` and `index` it is these; else with `detect` JAX finds the processes
    of a TPU pod, SLURM or Open MPI; else this process is alone. A second call does nothing.

    Raises:
      ConfigError: the processes cannot be joined.
    """
    if jax.distributed.is_initialized():
        return
    try:
        if config.coordinator:
            jax.distributed.initialize(
                config.coordinator,
                config.count,
                config.index,
                # Else a process under SLURM would get only one of its GPUs.
                cluster_detection_method="deactivate",
            )
        elif config.detect and is_multi_process_environment(os.environ):
            jax.distributed.initialize()
    # ValueError: the environment is incomplete; RuntimeError: no connection, or JAX already runs.
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot join the other processes: {error}; name them with processes.coordinator, "
            "processes.count and processes.index, or set processes.detect to false to run alone"
        ) from error


def exit_without_barrier(exit_code: int) -> None:
    """After an error: lets this process, one of several, end without waiting for the others.

    They may be in a step that it will never join. They end as they see its connections closed, or
    at the latest when JAX misses its heartbeat.
    """

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    # What is registered last runs first, so before JAX waits.
    if jax.distributed.is_initialized():
        atexit.register(leave)


def is_multi_process_environment(environment: Mapping[str, str]) -> bool:
    """Whether a launcher's variables say that this process is one of several.

    Those of SLURM (`srun`), Open MPI (`mpirun`), and TPU pods; where a TPU's variables say nothing,
    its machine's metadata is asked, as JAX does.
    """
    # A batch script that SLURM starts has a number of tasks too, but is none of them.
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        return int(environment.get("SLURM_NTASKS", "1")) > 1
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True
    if environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if hosts := environment.get(name):
            return "," in hosts
    # JAX sets this variable where it finds no TPU.
    if "TPU_SKIP_MDS_QUERY" in environment or importlib.util.find_spec("libtpu") is None:
        return False
    return "tpu" in environment.get("JAX_PLATFORMS", "tpu") and "," in _tpu_hosts()


def _tpu_hosts() -> str:
    request = urllib.request.Request(
        _METADATA + "worker-network-endpoints", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()
    except OSError:
        # Not a machine of that cloud, so not one of its pods.
        return ""


def is_main() -> bool:
    """Whether this process is the one that writes logs and prints."""
    return jax.process_index() == 0


def rows_of_processes(mesh: Mesh, batch_size: int) -> dict[int, tuple[int, ...]]:
    """For each process with devices in the mesh, the rows of the global batch that they hold.

    They rise, but need not be neighbours: a mesh that follows the wires of a TPU pod may give a
    process rows 0, 1, 4 and 5.

    Args:
      mesh: the run's devices.
      batch_size: rows of the global batch.
    """
    # Only the split of rows matters, so any length that all parts divide will do.
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
            f"the mesh has {mesh.size} devices, none of them of process {jax.process_index()}; "
            "set one axis of [mesh] to -1 to use the devices of all processes"
        )
    return rows[jax.process_index()]


def num_shards_of(mesh: Mesh, batch_size: int) -> int:
    """The fewest equal shards of a batch such that each has its rows in whole processes.

    So a document is read by no more processes than need it: one, unless they share rows.
    """
    rows = rows_of_processes(mesh, batch_size)
    holders = [{process for process in rows if row in rows[process]} for row in range(batch_size)]
    borders = [row for row in range(1, batch_size) if holders[row] != holders[row - 1]]
    return batch_size // math.gcd(batch_size, *borders)


def place_batch(batch: Batch, mesh: Mesh, *, rows: Sequence[int], batch_size: int) -> Batch:
    """Puts a process's rows on the mesh: the global batch, of which each device has its part.

    A device gets its rows and its part of the sequence, cut from the host's whole rows.

    Args:
      batch: numpy arrays (..., b, L), the same leading axes everywhere: rows `rows` of the global
        batch, all L tokens of each.
      mesh: the run's devices.
      rows: from `rows_of_process`.
      batch_size: rows B of the global batch.

    Returns:
      Global arrays (..., B, L).
    """

    def place(array: np.ndarray) -> jax.Array:
        *leading, _, length = array.shape
        sharding = batch_sharding(mesh, leading=len(leading))

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[-2].indices(batch_size)
            # A device's rows are neighbours, so they are neighbours among the process's too.
            first = bisect.bisect_left(rows, start)
            return array[..., first : first + stop - start, index[-1]]

        return jax.make_array_from_callback((*leading, batch_size, length), sharding, part)

    return jax.tree.map(place, batch)


def all_gather_json(value: Any) -> list[Any]:
    """What every process hands in, in their order. All of them must call it, with JSON values."""
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
    """Whether all processes hand in True; returns after all of them have called it."""
    return all(all_gather_json(ok))


class DelayedGlobalMax:
    """The largest of the numbers that the processes hand in each step, known to all a step later.

    So nobody waits for the step that runs: the maximum is taken by the devices after it, and read
    when the next one is on its way. In one process the number is known at once.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._shape = (mesh.size,)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._maximum = jax.jit(
            lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._placed: dict[int, jax.Array] = {}
        self._pending: jax.Array | None = None

    def exchange(self, number: int) -> int:
        """Hands in this step's number, not negative; returns the maximum of the step before.

        All processes must call it equally often. The first call returns 0.
        """
        if jax.process_count() == 1:
            return number
        if number not in self._placed:
            value = np.full(1, number, np.int32)
            self._placed[number] = jax.make_array_from_callback(
                self._shape, self._sharding, lambda _: value
            )
        before, self._pending = self._pending, self._maximum(self._placed[number])
        return 0 if before is None else int(before)
