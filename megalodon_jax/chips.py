"""What the makers' data sheets say of accelerators, and what of it one mesh axis gets.

TPUs: Google Cloud's page of each generation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e,
tpu7x), which gives a chip's links as one sum over both directions. H200: NVIDIA's data sheet of the
SXM module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from megalodon_jax.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      name: as topologies call it.
      hbm_bytes: memory.
      flops: dense bfloat16 FLOP/s.
      hbm_rate: bytes/s of its memory.
      link_rate: bytes/s in one direction of one link to a neighbour (TPU), or of all NVLinks.
      torus: dimensions of the network of chips; 0: a switch.
      ring: least length at which a dimension is closed to a ring; its multiples are, too.
      network_rate: bytes/s in one direction over the data center's network; None: not published.
    """

    name: str
    hbm_bytes: float
    flops: float
    hbm_rate: float
    link_rate: float
    torus: int
    ring: int
    network_rate: float | None


CHIPS: dict[str, Chip] = {
    # By device kind. Links: v4 2,400 Gbit/s one way over 6; v5e 400, v5p 1,200, v6e 800 and tpu7x
    # 1,200 GB/s both ways over 4, 6, 4 and 6.
    "TPU v4": Chip("v4", 32 * GIB, 275e12, 1200e9, 50e9, 3, 4, None),
    "TPU v5 lite": Chip("v5e", 16 * GIB, 197e12, 819e9, 50e9, 2, 16, 25e9 / 8),
    "TPU v5": Chip("v5p", 95 * GIB, 459e12, 2765e9, 100e9, 3, 4, 50e9 / 8),
    "TPU v6 lite": Chip("v6e", 32 * GIB, 918e12, 1638e9, 100e9, 2, 16, 100e9 / 8),
    "TPU7x": Chip("tpu7x", 192 * GIB, 2307e12, 7380e9, 100e9, 3, 4, 100e9 / 8),
    "NVIDIA H200": Chip("h200", 141e9, 989e12, 4800e9, 450e9, 0, 0, None),
}


@dataclass(frozen=True)
class Machine:
    """The devices of a mesh, as JAX counts them (on v4 and tpu7x two share a chip).

    Attributes:
      chip: the kind of chip.
      mesh: its devices.
      devices_per_chip: how many share a chip's memory, arithmetic and links.
    """

    chip: Chip
    mesh: Mesh
    devices_per_chip: int

    @property
    def hbm_bytes(self) -> float:
        """Memory of a device."""
        return self.chip.hbm_bytes / self.devices_per_chip

    @property
    def flops(self) -> float:
        """bfloat16 FLOP/s of a device."""
        return self.chip.flops / self.devices_per_chip

    @property
    def hbm_rate(self) -> float:
        """Bytes/s of a device's memory."""
        return self.chip.hbm_rate / self.devices_per_chip

    def slices(self, axes: Sequence[str]) -> int:
        """Slices, connected by the data center's network, over which these mesh axes run."""
        return len({_slice_of(device) for device in self._line(axes)})

    def link_rate(self, axes: Sequence[str]) -> float:
        """Bytes/s that a device sends, at best, to others along these mesh axes in its slice.

        Every dimension of the torus along which they lie carries one link, or two where they fill
        it and it closes to a ring. Other traffic on the same links is not known here.
        """
        if not self.chip.torus:
            return self.chip.link_rate
        line = [one for one in self._line(axes) if _slice_of(one) == _slice_of(self._line(axes)[0])]
        own = _coordinates(line)
        every = _coordinates(list(self.mesh.devices.flat))
        links = 0
        for dimension in range(own.shape[1]):
            length, whole = (len(set(points[:, dimension])) for points in (own, every))
            closed = length == whole and whole % self.chip.ring == 0
            links += (length > 1) * (2 if closed else 1)
        # Devices of one chip reach each other without links; they are not slower than over one.
        return max(links, 1) * self.chip.link_rate / self.devices_per_chip

    def _line(self, axes: Sequence[str]) -> list[Any]:
        """The devices along some mesh axes, at the origin of the others."""
        index = tuple(slice(None) if axis in axes else 0 for axis in self.mesh.axis_names)
        return list(np.ravel(self.mesh.devices[index]))


def describe_machine(mesh: Mesh) -> Machine:
    """What is known of the chips of a mesh.

    Raises:
      ConfigError: nothing is; the known kinds are named.
    """
    devices = list(mesh.devices.flat)
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise ConfigError(f"no data sheet for {kind!r}; there are: {', '.join(CHIPS)}")
    chip = CHIPS[kind]
    if not chip.torus:
        return Machine(chip, mesh, 1)
    # On v5p a chip's two cores are one device; v4 and tpu7x show both.
    return Machine(chip, mesh, 1 + max(getattr(device, "core_on_chip", 0) for device in devices))


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", 0) or 0


def _coordinates(devices: list[Any]) -> np.ndarray:
    return np.array([device.coords for device in devices])
