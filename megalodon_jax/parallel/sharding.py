"""Sharding rules: the mesh axes of every logical axis of parameters and activations.

Modules name logical axes; `RULES` maps them to mesh axes. Without a mesh nothing is sharded.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.errors import ConfigError
from megalodon_jax.parallel.mesh import AXES
from megalodon_jax.typing import Array, PRNGKey

RULES: dict[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("replica", "data"),
    "length": ("chunk",),
    # Matrices: the axis of the residual stream, and the other axis (also that of the bias). FSDP
    # takes the sequence's devices too: they need the same gathers, and hold 1 / size of the state.
    "embed": ("data", "chunk"),
    "embed_out": ("model",),
    "query": ("model",),
    "value": ("model",),
    "ffn": ("model",),
    "vocab": ("model",),
    # Per-channel parameters and activations: no communication.
    "channels": ("model",),
    "norm_groups": ("model",),
    "heads": ("model",),
    # The leading axis of stacked blocks.
    "layers": (),
}


def partition_spec(*names: str | None) -> Any:
    """The `PartitionSpec` of an array with these logical axes.

    The return type is `Any` because the spec replaces an array in trees.

    Raises:
      ValueError: a name is unknown, or two axes map to the same mesh axis.
    """
    entries: list[Any] = []
    used: dict[str, str] = {}
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"no rule for logical axis {name!r}; use one of {', '.join(RULES)}")
        axes = () if name is None else RULES[name]
        for axis in axes:
            if axis in used:
                raise ValueError(
                    f"logical axes {used[axis]!r} and {name!r} of one array both map to mesh axis "
                    f"{axis!r}; name one of them None"
                )
            used[axis] = name or ""
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of Params (or of their copies in an optimizer) by their axis names."""

    def sharding(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        if not jax.tree.leaves(leaf):
            return leaf  # an optimizer of other parameters has no moment of this one
        names = leaf.get_metadata().get("out_sharding") or ()
        return leaf.replace(NamedSharding(mesh, partition_spec(*names)))

    return jax.tree.map(sharding, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def with_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shapes and dtypes of a tree of Params, with their shardings over `mesh`.

    Raises:
      ConfigError: an array does not divide over the mesh.
    """

    def with_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
            raise ConfigError(
                f"an array of shape {leaf.shape} does not divide over mesh {axes}, sharded as "
                f"{sharding.spec}; use another mesh"
            ) from error
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, tree, shardings_of(tree, mesh))


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """The sharding of token arrays (..., B, L) with `leading` unsharded axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, *partition_spec("batch", "length")))


def axis_size(axis: str) -> int:
    """Size of an axis of the current mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def weight_axes() -> tuple[str, ...]:
    """The mesh axes of more than one device over which FSDP shards the weights."""
    return tuple(axis for axis in RULES["embed"] if axis_size(axis) > 1)


def sequence_axis() -> str | None:
    """The mesh axis over which sequences are sharded; None without context parallelism.

    Operations call it `sequence_axis`; the mesh axis has the paper's name `chunk`.
    """
    return "chunk" if axis_size("chunk") > 1 else None


def has_multiple_devices() -> bool:
    """Whether the current mesh has more than one device."""
    return jax.sharding.get_abstract_mesh().size > 1


def constrain(x: Array, *names: str | None) -> Array:
    """Constrains x to the sharding of its logical axes; returns x itself on one device."""
    if not has_multiple_devices():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(*names))


def shard_map_logical(
    function: Callable[..., Any], *, in_specs: tuple[Any, ...], out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map` over all axes of the current mesh; `function` itself on one device.

    Kernels need it, because the compiler cannot partition them.

    Args:
      function: maps trees of local arrays to a tree of local arrays.
      in_specs: `partition_spec` of each argument, or a tree of them; None for an absent argument.
      out_specs: the same for the result.
    """
    if not has_multiple_devices():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def fold_in_device_index(key: PRNGKey) -> PRNGKey:
    """A different key on every device inside `shard_map_logical`; the key itself on one device."""
    if has_multiple_devices():
        for axis in AXES:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key
