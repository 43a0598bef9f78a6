"""Where every logical axis of parameters and activations goes on the mesh.

Modules name axes, `RULES` says which mesh axes they are sharded over, and without a mesh nothing
happens.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.parallel.mesh import AXES
from megalodon_jax.typing import Array, PRNGKey

RULES: dict[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("replica", "data"),
    "length": ("chunk",),
    # Matrices: the axis of the residual stream, then the other axis (its bias has the same name).
    "embed": ("data",),
    "embed_out": ("model",),
    "query": ("model",),
    "value": ("model",),
    "ffn": ("model",),
    "vocab": ("model",),
    # Per-channel parameters and activations, which need no communication.
    "channels": ("model",),
    "norm_groups": ("model",),
    "heads": ("model",),
    # The leading axis of stacked blocks.
    "layers": (),
}


def partition_spec(*names: str | None) -> Any:
    """The `PartitionSpec` of an array whose axes have these logical names.

    Typed `Any`, so that it may stand in a tree in place of the array.

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
    """Shardings of a tree of Params (or an optimizer's copies of them), by their axis names."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        names = leaf.get_metadata().get("out_sharding") or ()
        return leaf.replace(NamedSharding(mesh, partition_spec(*names)))

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """The sharding of (B, L) arrays of tokens, after `leading` axes that are not sharded."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, *partition_spec("batch", "length")))


def axis_size(axis: str) -> int:
    """Devices along one axis of the mesh in use; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def sequence_axis() -> str | None:
    """The mesh axis over which sequences are sharded; None where every device has whole rows.

    Operations call it `sequence_axis`; on the mesh it is the axis `chunk`, as the paper has it.
    """
    return "chunk" if axis_size("chunk") > 1 else None


def has_multiple_devices() -> bool:
    """Whether the mesh in use has more than one device."""
    return jax.sharding.get_abstract_mesh().size > 1


def constrain(x: Array, *names: str | None) -> Array:
    """x with the sharding of its logical axes; x itself without a mesh of several devices."""
    if not has_multiple_devices():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(*names))


def shard_map_logical(
    function: Callable[..., Any], *, in_specs: tuple[Any, ...], out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map` over all axes of the mesh in use; `function` itself on one device.

    Kernels need it: the compiler cannot partition them.

    Args:
      function: takes and returns trees of local arrays.
      in_specs: for each argument its `partition_spec`, or a tree of them; None for an absent one.
      out_specs: the same for the result.
    """
    if not has_multiple_devices():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def fold_in_device_index(key: PRNGKey) -> PRNGKey:
    """Inside `shard_map_logical`, a key of this device's own; the key itself on one device."""
    if has_multiple_devices():
        for axis in AXES:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key
