"""The devices of a mesh, and the bandwidth between them along its axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from megalodon_jax.chips import Chip, require_chip


@dataclass(frozen=True)
class Machine:
    """The devices of a mesh, as JAX counts them (on tpu7x two share a chip).

    Attributes:
      chip: the kind of chip.
      mesh: its devices.
    """

    chip: Chip
    mesh: Mesh

    @property
    def memory_bytes(self) -> float:
        """Memory of a device."""
        return self.chip.memory_bytes / self.chip.devices_per_chip

    @property
    def flops_per_second(self) -> float:
        """Dense bfloat16 peak of a device."""
        return self.chip.device_flops_per_second

    @property
    def memory_bytes_per_second(self) -> float:
        """Peak rate of a device's memory."""
        return self.chip.memory_bytes_per_second / self.chip.devices_per_chip

    def num_slices(self, axes: Sequence[str]) -> int:
        """Slices, connected by the data center's network, that these mesh axes span."""
        return len({_slice_index(device) for device in self._devices_along(axes)})

    def link_bytes_per_second(self, axes: Sequence[str]) -> float:
        """Peak rate at which a device sends to others along these mesh axes inside its slice.

        Every torus dimension that the axes span carries one link, or two where they span all of it
        and it is closed to a ring. Other traffic on the same links is not considered.
        """
        if not self.chip.torus_dimensions:
            return self.chip.link_bytes_per_second
        devices = self._devices_along(axes)
        first_slice = _slice_index(devices[0])
        own = _coordinates([device for device in devices if _slice_index(device) == first_slice])
        every = _coordinates(list(self.mesh.devices.flat))
        links = 0
        for dimension in range(own.shape[1]):
            length, whole = (len(set(points[:, dimension])) for points in (own, every))
            is_ring = length == whole and whole % self.chip.ring_length == 0
            links += (length > 1) * (2 if is_ring else 1)
        # Devices of one chip reach each other without links, at no less than a link's rate.
        return max(links, 1) * self.chip.link_bytes_per_second / self.chip.devices_per_chip

    def _devices_along(self, axes: Sequence[str]) -> list[Any]:
        """The devices along some mesh axes, at the origin of the other axes."""
        index = tuple(slice(None) if axis in axes else 0 for axis in self.mesh.axis_names)
        return list(np.ravel(self.mesh.devices[index]))


def describe_machine(mesh: Mesh) -> Machine:
    """The data sheet of a mesh's devices.

    Raises:
      ConfigError: there is none for this kind of device; the known kinds are named.
    """
    return Machine(require_chip(mesh.devices.flat[0].device_kind), mesh)


def _slice_index(device: Any) -> int:
    return getattr(device, "slice_index", 0) or 0


def _coordinates(devices: list[Any]) -> np.ndarray:
    return np.array([device.coords for device in devices])
