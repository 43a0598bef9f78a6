"""Data sheets of accelerators: the only table of their arithmetic, memory and links.

TPU: Google Cloud's page of each generation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e,
tpu7x). GPU: NVIDIA's data sheets of the A100, H100 and H200. What one kernel may use of a device
(registers, shared memory, VMEM) is in `pallas_kernels.common.devices`.
"""

from dataclasses import dataclass

from megalodon_jax.errors import ConfigError
from pallas_kernels.common.devices import canonical_tpu_kind

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip.

    Attributes:
      name: short name, as topologies use it ("v5p:4x4x8", "h200:8").
      memory_bytes: capacity of its memory.
      flops_per_second: dense bfloat16 peak.
      memory_bytes_per_second: peak rate of its memory.
      link_bytes_per_second: one direction of one link to a neighbour (TPU), of all NVLinks
        together, or of the PCIe connector.
      torus_dimensions: dimensions of the network of chips; 0: a switch.
      ring_length: a torus dimension of a multiple of this many chips is closed to a ring.
      network_bytes_per_second: one direction over the data center's network; None: not published.
      clock_hz: clock of its cores; None: not published.
      step_efficiency: the time of a training step at the peak rates, nothing hidden, over the time
        measured; None: never measured.
      devices_per_chip: how many devices JAX makes of it.
    """

    name: str
    memory_bytes: float
    flops_per_second: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    torus_dimensions: int = 0
    ring_length: int = 0
    network_bytes_per_second: float | None = None
    clock_hz: float | None = None
    step_efficiency: float | None = None
    devices_per_chip: int = 1

    @property
    def device_flops_per_second(self) -> float:
        """Dense bfloat16 peak of one JAX device."""
        return self.flops_per_second / self.devices_per_chip


def _tpu(
    name: str,
    gib: int,
    flops: float,
    memory: float,
    link: float,
    *,
    torus: int,
    network: float | None,
    clock: float | None,
    devices: int = 1,
) -> Chip:
    return Chip(
        name=name,
        memory_bytes=gib * GIB,
        flops_per_second=flops,
        memory_bytes_per_second=memory,
        link_bytes_per_second=link,
        torus_dimensions=torus,
        ring_length=4 if torus == 3 else 16,
        network_bytes_per_second=network,
        clock_hz=clock,
        devices_per_chip=devices,
    )


def _gpu(
    name: str,
    gigabytes: int,
    flops: float,
    memory: float,
    link: float,
    *,
    clock: float | None = None,
    efficiency: float | None = None,
) -> Chip:
    return Chip(
        name=name,
        memory_bytes=gigabytes * 1e9,
        flops_per_second=flops,
        memory_bytes_per_second=memory,
        link_bytes_per_second=link,
        clock_hz=clock,
        step_efficiency=efficiency,
    )


# By JAX's device kind; a TPU's other names are aliases (`canonical_tpu_kind`).
CHIPS: dict[str, Chip] = {
    # The pages give a chip's links as one sum over both directions: v4 2,400 Gbit/s one way over 6
    # links; v5e 400, v5p 1,200, v6e 800 and tpu7x 1,200 GB/s both ways over 4, 6, 4 and 6.
    "TPU v4": _tpu("v4", 32, 275e12, 1200e9, 50e9, torus=3, network=None, clock=1.05e9),
    "TPU v5 lite": _tpu("v5e", 16, 197e12, 819e9, 50e9, torus=2, network=25e9 / 8, clock=1.5e9),
    "TPU v5": _tpu("v5p", 95, 459e12, 2765e9, 100e9, torus=3, network=50e9 / 8, clock=1.75e9),
    "TPU v6 lite": _tpu("v6e", 32, 918e12, 1638e9, 100e9, torus=2, network=100e9 / 8, clock=1.75e9),
    "TPU7x": _tpu(
        "tpu7x", 192, 2307e12, 7380e9, 100e9, torus=3, network=100e9 / 8, clock=None, devices=2
    ),
    # Efficiency: steps of 200M, 1.3B and 7B models on one and four devices
    # (megalodon_jax/plan/README.md).
    # SXM modules with NVLink (900 GB/s both ways on Hopper, 600 on Ampere); PCIe cards count the
    # connector (128 and 64 GB/s both ways), for NVLink bridges are optional there.
    "NVIDIA H200": _gpu("h200", 141, 989e12, 4800e9, 450e9, clock=1.98e9, efficiency=0.77),
    "NVIDIA H100 80GB HBM3": _gpu("h100", 80, 989e12, 3350e9, 450e9, clock=1.98e9, efficiency=0.82),
    "NVIDIA H100 PCIe": _gpu("h100-pcie", 80, 756e12, 2000e9, 64e9),
    "NVIDIA A100-SXM4-80GB": _gpu("a100-80gb", 80, 312e12, 2039e9, 300e9),
    "NVIDIA A100-SXM4-40GB": _gpu("a100-40gb", 40, 312e12, 1555e9, 300e9),
    "NVIDIA A100 80GB PCIe": _gpu("a100-80gb-pcie", 80, 312e12, 1935e9, 32e9),
    "NVIDIA A100-PCIE-40GB": _gpu("a100-40gb-pcie", 40, 312e12, 1555e9, 32e9),
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a JAX device kind, such as "TPU v5 lite" or "TPU v5e"; None if it is unknown."""
    return CHIPS.get(canonical_tpu_kind(device_kind))


def require_chip(device_kind: str) -> Chip:
    """The chip of a JAX device kind.

    Raises:
      ConfigError: the kind is unknown; the known ones are named.
    """
    chip = find_chip(device_kind)
    if chip is None:
        raise ConfigError(f"no data sheet for {device_kind!r}; there are: {', '.join(CHIPS)}")
    return chip


def device_kind_of(name: str) -> str:
    """JAX's device kind of a chip by its short name, such as "NVIDIA H200" of "h200".

    Raises:
      ConfigError: no chip has that name; the known ones are named.
    """
    kinds = {chip.name: kind for kind, chip in CHIPS.items()}
    if name not in kinds:
        raise ConfigError(f"no chip {name!r}; there are: {', '.join(kinds)}")
    return kinds[name]
