"""Documents of packed rows, as the implementations of attention need them.

A document is a run of equal segment ids that are not 0; a run of zeros is padding.
"""

import jax
import jax.numpy as jnp

from megalodon_jax.typing import Array, Bool, Float, Int32


def document_numbers(segment_ids: Int32[Array, "B L"]) -> Int32[Array, "B L"]:
    """Number of each token's document in its row, from 0; -1 at padding."""
    number = jnp.cumsum(_is_first(segment_ids), axis=1, dtype=jnp.int32) - 1
    return jnp.where(segment_ids != 0, number, -1)


def document_starts(segment_ids: Int32[Array, "B L"]) -> Int32[Array, "B L"]:
    """Index of the first token of each token's document; meaningless at padding."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(_is_first(segment_ids), index, 0), axis=1)


def zero_padding[T](arrays: T, segment_ids: Int32[Array, "B L"] | None) -> T:
    """The same tree of (B, L, heads, d) arrays with zeros at padding.

    A selection: padding may hold NaN, and 0 times NaN is NaN.
    """
    if segment_ids is None:
        return arrays
    is_token = (segment_ids != 0)[:, :, None, None]
    return jax.tree.map(lambda x: jnp.where(is_token, x, 0), arrays)


def pad_tokens(x: Array, count: int) -> Array:
    """Adds `count` zeros at the end of axis 1."""
    return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2)) if count else x


def repeat_heads(x: Float[Array, "B L K d"], num_heads: int) -> Float[Array, "B L H d"]:
    """Keys or values of every query head; H / K query heads in a row read the same ones."""
    repeats = num_heads // x.shape[2]
    return x if repeats == 1 else jnp.repeat(x, repeats, axis=2)


def _is_first(segment_ids: Int32[Array, "B L"]) -> Bool[Array, "B L"]:
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return (segment_ids != 0) & (segment_ids != before)
