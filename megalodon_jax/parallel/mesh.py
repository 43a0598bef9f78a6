"""The device mesh.

replica   full copies of the weights (data parallelism), across the slices of a multi-slice job
data      rows of the batch; weights and optimizer state are sharded over it too (FSDP)
chunk     the sequence (context parallelism), in whole attention chunks; FSDP as over data
model     heads, value and feed-forward features, channels, vocabulary (tensor parallelism)
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from megalodon_jax.config import (
    AnyEncoderConfig,
    AnyModelConfig,
    MeshConfig,
    TrainConfig,
    TransformerConfig,
    TransformerEncoderConfig,
)
from megalodon_jax.errors import ConfigError

AXES = ("replica", "data", "chunk", "model")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh of a configuration over `devices` (None: all), following their topology.

    Raises:
      ConfigError: the axis sizes do not match the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    shape = tuple(sizes[axis] for axis in AXES)
    # A mesh of one device uses the first one; `mesh_sizes` rejects other subsets.
    return Mesh(_arrange(devices[: math.prod(shape)], shape), AXES, axis_types=(AxisType.Auto,) * 4)


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of every axis, with -1 replaced by the number of remaining devices.

    Raises:
      ConfigError: the sizes do not match the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    text = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    if -1 in sizes.values():
        if num_devices % fixed:
            raise ConfigError(
                f"mesh {text}: {num_devices} devices do not divide by {fixed}; change an axis size"
            )
        return {axis: num_devices // fixed if s == -1 else s for axis, s in sizes.items()}
    if fixed > num_devices:
        raise ConfigError(
            f"mesh {text} needs {fixed} devices, there are {num_devices}; lower an axis size"
        )
    if fixed not in (1, num_devices):
        raise ConfigError(
            f"mesh {text} uses {fixed} of {num_devices} devices; set one axis to -1 to use all"
        )
    return sizes


def _arrange(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    from jax.experimental import mesh_utils

    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ConfigError(
                f"mesh.replica is {shape[0]}; use a multiple of the {slices} slices, because only "
                "the replica axis may cross the network between slices"
            )
        return mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]),
            (slices, 1, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def feature_sizes(model: AnyModelConfig) -> dict[str, int]:
    """The sizes of a model that the mesh axis `model` divides."""
    names = ["model_dim", "num_heads", "ffn_hidden_dim", "vocab_size"]
    if isinstance(model, TransformerConfig):
        names.append("kv_heads")
    elif not isinstance(model, TransformerEncoderConfig):
        names.append("norm_num_groups")
    sizes = {name: getattr(model, name) for name in names}
    if isinstance(model, AnyEncoderConfig):
        # Every channel is a group of its own; scores of classes are not sharded.
        return {name: size for name, size in sizes.items() if size is not None}
    return sizes | {"output_size": model.num_outputs}


def check_fits(config: TrainConfig, sizes: dict[str, int]) -> None:
    """Raises `ConfigError` with every problem if a run cannot be sharded over axes of `sizes`."""
    model, data = config.model, config.data
    data_shards, sequence_shards = sizes["replica"] * sizes["data"], sizes["chunk"]
    sharded = [
        ("data.batch_size", data.batch_size, data_shards, "mesh.replica * mesh.data"),
        ("data.seq_len", data.seq_len, sequence_shards, "mesh.chunk"),
        (
            "model.model_dim",
            model.model_dim,
            sizes["data"] * sequence_shards,
            "mesh.data * mesh.chunk",
        ),
    ]
    sharded += [
        (f"model.{name}", size, sizes["model"], "mesh.model")
        for name, size in feature_sizes(model).items()
    ]
    problems = [
        f"{name} {value} does not divide by {axis} = {size}"
        for name, value, size, axis in sharded
        if value % size
    ]
    if data.carry_state and sequence_shards > 1:
        problems.append(
            f"data.carry_state needs whole rows, but mesh.chunk is {sequence_shards}: sequence "
            "shards start from the empty state; use mesh.data, mesh.replica or mesh.model"
        )
    shard_length = data.seq_len // sequence_shards
    if isinstance(model, TransformerConfig):
        if sequence_shards > 1:
            problems.append(
                f"mesh.chunk is {sequence_shards}, but attention of a {model.kind} needs whole "
                "rows; use mesh.data or mesh.model"
            )
    elif sequence_shards > 1 and model.chunk_size and shard_length % model.chunk_size:
        problems.append(
            f"data.seq_len {data.seq_len} over mesh.chunk = {sequence_shards} gives "
            f"{shard_length} tokens per device, not a multiple of model.chunk_size "
            f"{model.chunk_size}: a sequence shard must hold whole chunks"
        )
    if problems:
        raise ConfigError(
            f"the run cannot be sharded over this mesh: {'; '.join(problems)}. Change the mesh or "
            "these sizes"
        )


def resolve_mesh(config: TrainConfig, mesh: Mesh | None = None) -> Mesh:
    """The given mesh, else that of the configuration over all devices; checks that the run fits.

    Raises:
      ConfigError: the run cannot be sharded over the mesh; every problem is named.
    """
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    check_fits(config, dict(mesh.shape))
    return mesh
