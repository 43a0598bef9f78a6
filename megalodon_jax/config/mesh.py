"""Configuration of the device mesh and of multi-process runs."""

from dataclasses import dataclass
from typing import Annotated, Self

from megalodon_jax.config.checks import Rule, check, check_keys
from megalodon_jax.config.ranges import Range
from megalodon_jax.presets import read_preset

AxisSize = Annotated[int, Range(low=1, high=1_000_000, special=(-1, "the remaining devices"))]
MESH_RULES = (
    Rule(
        lambda c: [c.replica, c.data, c.chunk, c.model].count(-1) <= 1,
        "mesh has -1 more than once; only one axis can take the remaining devices",
    ),
)


def _is_partly_given(c: "ProcessesConfig") -> bool:
    given = [bool(c.coordinator), c.count != 0, c.index != -1]
    return any(given) and not all(given)


def _has_host_and_port(coordinator: str) -> bool:
    host, _, port = coordinator.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 1 << 16


PROCESSES_RULES = (
    Rule(
        lambda c: not _is_partly_given(c),
        "processes.coordinator is {c.coordinator!r}, count {c.count}, index {c.index}; set all "
        "three or none",
    ),
    Rule(
        lambda c: _is_partly_given(c) or c.index == -1 or c.index < c.count,
        "processes.index is {c.index}; with count {c.count} use 0 to {c.last_index}",
    ),
    Rule(
        lambda c: not c.coordinator or _has_host_and_port(c.coordinator),
        'processes.coordinator is {c.coordinator!r}; use "host:port"',
    ),
)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 for all remaining devices."""

    replica: AxisSize = 1
    """Size of the replica axis: full copies of the weights (data parallelism, multi-slice jobs)."""
    data: AxisSize = 1
    """Size of the data axis: rows, weights and optimizer state are sharded over it (FSDP)."""
    chunk: AxisSize = 1
    """Size of the chunk axis: sequences are sharded in whole chunks (context parallelism), weights
    and optimizer state as over data."""
    model: AxisSize = 1
    """Size of the model axis: heads, features and vocabulary are sharded (tensor parallelism)."""

    def __post_init__(self) -> None:
        check(self, "mesh", MESH_RULES)

    @classmethod
    def from_preset(cls, name: str, **overrides: int) -> Self:
        """A named mesh from `configs/meshes/<name>.toml`, with overrides."""
        table = read_preset("meshes", name)
        return cls(**check_keys(cls, {**table, **overrides}, "mesh"))


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """Initialization of a multi-process run."""

    coordinator: str = ""
    """Address of process 0 as "host:port", together with `count` and `index`; empty: detect."""
    count: Annotated[int, Range(low=0, high=1_000_000)] = 0
    """Number of processes."""
    index: Annotated[int, Range(low=-1, high=1_000_000)] = -1
    """Index of this process, from 0."""
    detect: bool = True
    """Detect the processes of a TPU pod, SLURM or Open MPI if there is no coordinator. Under SLURM
    and Open MPI a process gets one GPU, that of its local rank, unless JAX_LOCAL_DEVICE_IDS lists
    more."""

    def __post_init__(self) -> None:
        check(self, "processes", PROCESSES_RULES)

    @property
    def last_index(self) -> int:
        """Index of the last process."""
        return self.count - 1
