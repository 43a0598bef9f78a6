"""Sums over the documents of packed rows, and their values back at the tokens.

A row has M documents at most, numbered from 1 in `segment_ids`; 0 is padding. Functions here take
a device's own tokens, inside `shard_map`, and sum over the sequence shards of `axis`.
"""

import jax
from jax import numpy as jnp

from megalodon_jax.parallel.sharding import partition_spec, sequence_axis, shard_map_logical
from megalodon_jax.typing import Array, Bool, Float, Int32

# Up to so many documents a product with a one-hot matrix sums them; sums by index, which take any
# number, are atomic updates on a GPU.
_MOST_BY_PRODUCT = 64


def document_lengths(segment_ids: Int32[Array, "B L"], max_documents: int) -> Int32[Array, "B M"]:
    """Tokens of every document of every row.

    Args:
      segment_ids: documents of each row, numbered from 1; 0 is padding.
      max_documents: most documents M of a row.
    """

    def count(segment_ids: Array) -> Array:
        ones = jnp.ones((*segment_ids.shape, 1), jnp.float32)
        sums = sum_documents(ones, segment_ids, max_documents, axis=sequence_axis())
        return sums[..., 0].astype(jnp.int32)

    return shard_map_logical(
        count, in_specs=(partition_spec("batch", "length"),), out_specs=partition_spec("batch")
    )(segment_ids)


def sum_documents(
    values: Float[Array, "B L F"],
    segment_ids: Int32[Array, "B L"] | None,
    max_documents: int,
    *,
    axis: str | None,
) -> Float[Array, "B M F"]:
    """The sum of the tokens of every document; padding and its values are left out.

    Args:
      values: float32 or float64.
      segment_ids: documents; None: every row is one document.
      max_documents: M.
      axis: mesh axis of the sequence shards; None: rows are whole.
    """
    if segment_ids is None:
        sums = jnp.sum(values, axis=1, keepdims=True)
    else:
        # A selection: 0 times NaN is NaN.
        values = jnp.where((segment_ids != 0)[..., None], values, 0)
        if max_documents == 1:
            sums = jnp.sum(values, axis=1, keepdims=True)
        elif max_documents <= _MOST_BY_PRODUCT:
            numbers = jnp.arange(1, max_documents + 1)
            one_hot = (segment_ids[..., None] == numbers).astype(values.dtype)
            highest = jax.lax.Precision.HIGHEST
            sums = jnp.einsum("blm,blf->bmf", one_hot, values, precision=highest)
        else:
            table = jnp.zeros((max_documents + 1, values.shape[-1]), values.dtype)
            sums = jax.vmap(lambda ids, rows: table.at[ids].add(rows))(segment_ids, values)[:, 1:]
    return sums if axis is None else jax.lax.psum(sums, axis)


def at_tokens(
    table: Float[Array, "B M F"], segment_ids: Int32[Array, "B L"] | None
) -> Float[Array, "B #L F"]:
    """The value of every token's document; NaN for document M + 1 and later ones.

    The value at padding is that of some document. Without segment ids, and with one document, the
    length is 1: the value is that of all tokens.
    """
    if segment_ids is None:
        return table
    if table.shape[1] == 1:
        has_more = jnp.max(segment_ids, axis=1, initial=0)[:, None, None] > 1
        return jnp.where(has_more, jnp.nan, table)
    index = jnp.maximum(segment_ids - 1, 0)[..., None]
    return jnp.take_along_axis(table, index, axis=1, mode="fill", fill_value=jnp.nan)


def is_token(segment_ids: Int32[Array, "B L"] | None) -> Bool[Array, "B L 1"] | bool:
    """True where a token is not padding."""
    return True if segment_ids is None else (segment_ids != 0)[..., None]
