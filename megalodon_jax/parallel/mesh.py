"""The mesh of devices.

replica   whole copies of the weights: the slices of a multi-slice job, over the slower network
data      rows of the batch; weights and optimizer state are sharded over it as well (FSDP)
chunk     the sequence: context parallelism, in whole attention chunks
model     heads, value and feed-forward features, channels, vocabulary (tensor parallelism)
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from megalodon_jax.config import MeshConfig, TrainConfig
from megalodon_jax.errors import ConfigError

AXES = ("replica", "data", "chunk", "model")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a configuration over `devices` (None: all), neighbours close to each other.

    Raises:
      ConfigError: the devices do not fill the mesh, or there are fewer.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    shape = tuple(sizes[axis] for axis in AXES)
    # One device is enough for one part, whatever else the machine has.
    return Mesh(_arrange(devices[: math.prod(shape)], shape), AXES, axis_types=(AxisType.Auto,) * 4)


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of every axis; -1 stands for all devices that are left.

    Raises:
      ConfigError: the sizes and the number of devices do not fit together.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    text = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    if -1 in sizes.values():
        if num_devices % known:
            raise ConfigError(f"mesh {text}: {num_devices} devices do not divide by {known}")
        return {axis: num_devices // known if s == -1 else s for axis, s in sizes.items()}
    if known > num_devices:
        raise ConfigError(f"mesh {text} needs {known} devices, there are {num_devices}")
    if known not in (1, num_devices):
        raise ConfigError(
            f"mesh {text} uses {known} of {num_devices} devices; set one axis to -1 to use all"
        )
    return sizes


def _arrange(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    from jax.experimental import mesh_utils

    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ConfigError(
                f"mesh.replica is {shape[0]}; with {slices} slices it must be a multiple of that, "
                "for only replicas may talk over the network between slices"
            )
        return mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]),
            (slices, 1, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def check_fits(config: TrainConfig, sizes: dict[str, int]) -> None:
    """Raises `ConfigError`, naming every reason, if a run cannot be split over axes of `sizes`."""
    model, data = config.model, config.data
    rows, length = sizes["replica"] * sizes["data"], sizes["chunk"]
    split = [
        ("data.batch_size", data.batch_size, rows, "mesh.replica * mesh.data"),
        ("data.seq_len", data.seq_len, length, "mesh.chunk"),
        ("model.model_dim", model.model_dim, sizes["data"], "mesh.data"),
    ]
    for name in ("model_dim", "num_heads", "ffn_hidden_dim", "norm_num_groups", "vocab_size"):
        split.append((f"model.{name}", getattr(model, name), sizes["model"], "mesh.model"))
    split.append(("model.output_size", model.num_outputs, sizes["model"], "mesh.model"))
    problems = [
        f"{name} {value} does not divide by {axis} = {parts}"
        for name, value, parts, axis in split
        if value % parts
    ]
    local = data.seq_len // length
    if length > 1 and local % model.chunk_size:
        problems.append(
            f"data.seq_len {data.seq_len} over mesh.chunk = {length} leaves {local} tokens a "
            f"device, no multiple of model.chunk_size {model.chunk_size}: attention stays local "
            "only in whole chunks"
        )
    if problems:
        raise ConfigError("this mesh does not fit: " + "; ".join(problems))


def resolve_mesh(config: TrainConfig, mesh: Mesh | None = None) -> Mesh:
    """The mesh that is given, or that of the configuration over all devices, if the run fits it.

    Raises:
      ConfigError: it does not; every size that does not divide is named.
    """
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    check_fits(config, dict(mesh.shape))
    return mesh
