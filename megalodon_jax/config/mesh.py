"""The mesh of devices, and the processes of a run on several hosts."""

from dataclasses import dataclass
from typing import Self

from megalodon_jax.config.checks import check_keys, require
from megalodon_jax.presets import read_preset


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many parts the run is split into along each axis; one of them may be -1: the rest."""

    replica: int = 1
    """Whole copies of the weights: the slices of a multi-slice job, or plain data parallelism."""
    data: int = 1
    """Parts of the batch; weights and optimizer state are split over them too (FSDP)."""
    chunk: int = 1
    """Parts of the sequence; each holds whole attention chunks."""
    model: int = 1
    """Parts of heads, features and vocabulary (tensor parallelism)."""

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in ("replica", "data", "chunk", "model")}
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name} is {size}; use 1 or more, or -1")
        require(
            list(sizes.values()).count(-1) <= 1,
            "mesh has -1 more than once; only one axis can take the devices that are left",
        )

    @classmethod
    def from_preset(cls, name: str, **overrides: int) -> Self:
        """A named mesh, read from `configs/meshes/<name>.toml`, with some axes changed."""
        table = read_preset("meshes", name)
        return cls(**check_keys(cls, {**table, **overrides}, "mesh"))


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """How the processes of a run on several hosts find one another."""

    coordinator: str = ""
    """Address of process 0, "host:port"; with `count` and `index`, if they are not detected."""
    count: int = 0
    """Processes of the run."""
    index: int = -1
    """Which of them this one is, from 0."""
    detect: bool = True
    """Without a coordinator, join the processes of a TPU pod, SLURM or Open MPI. Under the last two
    a process gets one GPU, that of its place on the host, unless JAX_LOCAL_DEVICE_IDS lists more.
    """

    def __post_init__(self) -> None:
        given = [bool(self.coordinator), self.count != 0, self.index != -1]
        require(
            all(given) or not any(given),
            f"processes.coordinator is {self.coordinator!r}, count {self.count}, index "
            f"{self.index}; set all three, or none",
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
