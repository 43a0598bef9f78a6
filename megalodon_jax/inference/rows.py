"""Rows of a cache, or of any tree whose leaves have rows along their first axis."""

from functools import partial

import jax

from megalodon_jax.typing import Array, Int32


def take_row[T](tree: T, row: Int32[Array, ""] | int) -> T:
    """One row of every leaf, with a leading axis of 1."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), tree)


def put_row[T](tree: T, row: Int32[Array, ""] | int, values: T) -> T:
    """Writes one row of every leaf; in place under `jit` if `tree` is donated."""

    def put(leaf: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, value.astype(leaf.dtype), row, 0)

    return jax.tree.map(put, tree, values)


@partial(jax.jit, donate_argnums=0)
def move_row[T](tree: T, source: Int32[Array, ""], target: Int32[Array, ""]) -> T:
    """Copies a row over another one in place."""
    return put_row(tree, target, take_row(tree, source))


replace_row = jax.jit(put_row, donate_argnums=0)
"""`put_row`, compiled once for all rows."""

extract_row = jax.jit(take_row)
"""`take_row`, compiled once for all rows."""
