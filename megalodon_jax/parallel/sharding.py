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
    """Shardings for a tree of Params (or of an optimizer's copies of them) by their axes' names."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        names = leaf.get_metadata().get("out_sharding") or ()
        return leaf.replace(NamedSharding(mesh, partition_spec(*names)))

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Where (B, L) arrays of tokens go, after `leading` axes that are not split."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, *partition_spec("batch", "length")))


def axis_size(axis: str) -> int:
    """Parts along one axis of the mesh in use; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def sequence_axis() -> str | None:
    """The mesh axis over which sequences are split; None where every device has whole rows."""
    return "chunk" if axis_size("chunk") > 1 else None


def has_multiple_devices() -> bool:
    """Whether the mesh in use has more than one device."""
    return jax.sharding.get_abstract_mesh().size > 1


def constrain(x: Array, *names: str | None) -> Array:
    """x where its axes' logical names say; x itself without a mesh of several devices."""
    return (
        jax.lax.with_sharding_constraint(x, partition_spec(*names)) if has_multiple_devices() else x
    )


def shard_map_logical(
    function: Callable[..., Any], *, inputs: tuple[Any, ...], outputs: Any
) -> Callable[..., Any]:
    """`function` run by every device on its own part, as kernels must be.

    Args:
      function: takes and gives trees of local arrays.
      inputs: for each argument its `axes`, or a tree of them; None for an absent one.
      outputs: the same for the result.
    """
    if not has_multiple_devices():
        return function
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)


def fold_in_device_index(key: PRNGKey) -> PRNGKey:
    """Inside `shard_map_logical`, a key of this device's own; without a mesh the key itself."""
    if has_multiple_devices():
        for axis in AXES:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key
