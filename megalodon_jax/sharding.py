"""The mesh of devices, and where every logical axis of parameters and activations goes.

    replica   whole copies of the weights: the slices of a multi-slice job, over the slower network
    data      rows of the batch; weights and optimizer state are split over it as well (FSDP)
    chunk     the sequence
    model     heads, value and feed-forward features, channels, vocabulary (tensor parallelism)

Modules name axes, `RULES` says what the names mean, and outside a mesh nothing happens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from megalodon_jax.config import ConfigError, MeshConfig, TrainConfig
from megalodon_jax.typing import Array, PRNGKey

AXES = ("replica", "data", "chunk", "model")
RULES: dict[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("replica", "data"),
    "length": ("chunk",),
    # Matrices: the side of the residual stream, the other side, and the bias that goes with it.
    "embed": ("data",),
    "embed_out": ("model",),
    "query": ("model",),
    "value": ("model",),
    "ffn": ("model",),
    "vocab": ("model",),
    # The residual stream where every channel, or group of channels, stands alone.
    "channels": ("model",),
    "norm_groups": ("model",),
    "heads": ("model",),
    # The leading axis of stacked blocks.
    "layers": (),
}


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


def spec_of(names: Sequence[str | None]) -> PartitionSpec:
    """Where an array goes whose axes have these logical names.

    Raises:
      ValueError: a name is unknown, or two axes would go to the same mesh axis.
    """
    parts: list[Any] = []
    taken: dict[str, str] = {}
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"no rule for logical axis {name!r}; there are: {', '.join(RULES)}")
        axes = () if name is None else RULES[name]
        for axis in axes:
            if axis in taken:
                raise ValueError(
                    f"logical axes {taken[axis]!r} and {name!r} of one array both go to mesh axis "
                    f"{axis!r}"
                )
            taken[axis] = name or ""
        parts.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*parts)


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of Params (or of an optimizer's copies of them) by their axes' names."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        names = leaf.get_metadata().get("out_sharding") or ()
        return leaf.replace(NamedSharding(mesh, spec_of(names)))

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Where (B, L) arrays of tokens go, after `leading` axes that are not split."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, *spec_of(("batch", "length"))))


def axis_size(axis: str) -> int:
    """Parts along one axis of the mesh in use; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def sequence_axis() -> str | None:
    """The mesh axis over which sequences are split; None where every device has whole rows."""
    return "chunk" if axis_size("chunk") > 1 else None


def is_split() -> bool:
    """Whether the mesh in use has more than one device."""
    return jax.sharding.get_abstract_mesh().size > 1


def constrain(x: Array, *names: str | None) -> Array:
    """x where its axes' logical names say; x itself without a mesh of several devices."""
    return jax.lax.with_sharding_constraint(x, spec_of(names)) if is_split() else x


def mapped(
    function: Callable[..., Any], *, inputs: tuple[Any, ...], outputs: Any
) -> Callable[..., Any]:
    """`function` run by every device on its own part, as kernels must be.

    Args:
      function: takes and gives trees of local arrays.
      inputs: for each argument its `axes`, or a tree of them; None for an absent one.
      outputs: the same for the result.
    """
    if not is_split():
        return function
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)


def axes(*names: str | None) -> Any:
    """Where an array with these logical axes goes, for the trees of `mapped`."""
    return spec_of(names)


def fold_in_place(key: PRNGKey) -> PRNGKey:
    """Inside `mapped`, a key of this device's own; without a mesh the key itself."""
    if is_split():
        for axis in AXES:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key
