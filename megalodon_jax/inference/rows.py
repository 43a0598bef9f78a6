"""Rows of a cache, or of any tree whose leaves have rows along their first axis."""

from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from megalodon_jax.parallel.sharding import constrain, has_multiple_devices
from megalodon_jax.typing import Array, Int32
from pallas_kernels.chunk_attention import Int8Slots

# Logical axes of a cache's leaves by their number of axes: positions and counts, moments of norm
# groups, CEMA's states, keys and values.
_CACHE_AXES: dict[int, tuple[str | None, ...]] = {
    1: ("batch",),
    2: ("batch", "norm_groups"),
    3: ("batch", None, "channels"),
    4: ("batch", "heads", None, None),
}


def take_row[T](tree: T, row: Int32[Array, ""] | int) -> T:
    """One row of every leaf, with a leading axis of 1."""

    def take(leaf: Array) -> Array:
        if has_multiple_devices():
            # A gather sums the devices' shares; a slice would gather all rows on each.
            return jnp.take(leaf, jnp.reshape(row, 1), axis=0)
        return jax.lax.dynamic_slice_in_dim(leaf, row, 1)

    return jax.tree.map(take, tree)


def put_row[T](tree: T, row: Int32[Array, ""] | int, values: T) -> T:
    """Writes one row of every leaf; in place under `jit` if `tree` is donated."""

    def put(leaf: Array, value: Array) -> Array:
        value = value.astype(leaf.dtype)
        if has_multiple_devices():
            is_row = jnp.arange(leaf.shape[0]) == row
            return jnp.where(is_row.reshape(-1, *[1] * (leaf.ndim - 1)), value, leaf)
        return jax.lax.dynamic_update_slice_in_dim(leaf, value, row, 0)

    return jax.tree.map(put, tree, values)


def set_rows(old: Array, new: Array) -> Array:
    """Writes the first rows in place."""
    return new if new.shape == old.shape else old.at[: new.shape[0]].set(new)


def constrain_cache[T](cache: T) -> T:
    """The cache sharded over a mesh: rows over `replica` and `data`, features over `model`.

    Every program of the engine constrains its results: caches then have one sharding, and none is
    compiled again for another.
    """

    def constrain_node(node: Any) -> Any:
        if not isinstance(node, Int8Slots):
            return constrain(node, *_CACHE_AXES[node.ndim])
        # A scale of every slot has three axes, as CEMA's state.
        values = constrain(node.values, *_CACHE_AXES[4])
        return Int8Slots(values, constrain(node.scale, *_CACHE_AXES[4][:3]))

    return jax.tree.map(constrain_node, cache, is_leaf=lambda node: isinstance(node, Int8Slots))


def replicate[T](tree: T) -> T:
    """The tree with a copy on every device."""
    return jax.tree.map(lambda leaf: constrain(leaf, *[None] * leaf.ndim), tree)


@jax.jit
def extract_row(cache: Any, row: Int32[Array, ""] | int) -> Any:
    """`take_row` of a cache, on every device."""
    return replicate(take_row(cache, row))


@partial(jax.jit, donate_argnums=0)
def replace_row(cache: Any, row: Int32[Array, ""] | int, values: Any) -> Any:
    """`put_row` of a cache in place."""
    return constrain_cache(put_row(cache, row, values))
