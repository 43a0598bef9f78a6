"""Configuration of the device mesh and of multi-process runs."""

from dataclasses import dataclass
from typing import Self

from megalodon_jax.config.checks import check_keys, require
from megalodon_jax.presets import read_preset


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 for all remaining devices."""

    replica: int = 1
    """Size of the replica axis: full copies of the weights (data parallelism, multi-slice jobs)."""
    data: int = 1
    """Size of the data axis: rows, weights and optimizer state are sharded over it (FSDP)."""
    chunk: int = 1
    """Size of the chunk axis: sequences are sharded in whole chunks (context parallelism)."""
    model: int = 1
    """Size of the model axis: heads, features and vocabulary are sharded (tensor parallelism)."""

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in ("replica", "data", "chunk", "model")}
        for name, size in sizes.items():
            require(
                size == -1 or size >= 1,
                f"mesh.{name} is {size}; use 1 or more, or -1 for the remaining devices",
            )
        require(
            list(sizes.values()).count(-1) <= 1,
            "mesh has -1 more than once; only one axis can take the remaining devices",
        )

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
    count: int = 0
    """Number of processes."""
    index: int = -1
    """Index of this process, from 0."""
    detect: bool = True
    """Detect the processes of a TPU pod, SLURM or Open MPI if there is no coordinator. Under SLURM
    and Open MPI a process gets one GPU, that of its local rank, unless JAX_LOCAL_DEVICE_IDS lists
    more."""

    def __post_init__(self) -> None:
        given = [bool(self.coordinator), self.count != 0, self.index != -1]
        require(
            all(given) or not any(given),
            f"processes.coordinator is {self.coordinator!r}, count {self.count}, index "
            f"{self.index}; set all three or none",
        )
        if any(given):
            require(
                0 <= self.index < self.count,
                f"processes.index is {self.index}; with count {self.count} use 0 to "
                f"{self.count - 1}",
            )
            host, _, port = self.coordinator.rpartition(":")
            require(
                bool(host) and port.isdigit(),
                f'processes.coordinator is {self.coordinator!r}; use "host:port"',
            )
