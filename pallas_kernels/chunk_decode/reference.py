"""Chunk decoding by its definition, one row at a time: slow, float64-capable."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.types import (
    KeyValueCache,
    accumulation_dtype,
    matmul_precision,
)
from pallas_kernels.chunk_decode.types import ChunkDecodeOutput


def chunk_decode(
    q: Float[Array, "B H Dk"],
    k: Float[Array, "B H Dk"],
    v: Float[Array, "B H Dv"],
    cache: KeyValueCache,
    positions: Int32[Array, " B"],
    gate: Float[Array, "B H Dv"] | None,
) -> ChunkDecodeOutput:
    """A softmax over the filled slots of each row. Arguments as in `api.chunk_decode`."""
    num_slots = cache.key.shape[2]
    wide, precision = accumulation_dtype(q.dtype), matmul_precision(q.dtype)

    def attend(q, token, cache, slot):
        cache = jax.tree.map(lambda slots, new: slots.at[:, slot].set(new), cache, token)
        key, value = cache.decode(wide, wide)
        is_filled = jnp.arange(num_slots) <= slot
        scores = jnp.einsum("hd,hcd->hc", q, key, precision=precision, preferred_element_type=wide)
        weights = jax.nn.softmax(jnp.where(is_filled, scores, -jnp.inf), axis=-1)
        out = jnp.einsum(
            "hc,hcd->hd",
            weights.astype(v.dtype),
            # 0 times NaN is NaN.
            jnp.where(is_filled[:, None], value, 0),
            precision=precision,
            preferred_element_type=wide,
        )
        return out, cache

    slots, tokens = positions % num_slots, cache.encode(k, v)
    outs = []
    for row in range(q.shape[0]):
        token, old = jax.tree.map(lambda leaf, row=row: leaf[row], (tokens, cache))
        out, new = attend(q[row], token, old, slots[row])
        cache = jax.tree.map(lambda leaf, new, row=row: leaf.at[row].set(new), cache, new)
        outs.append(out)
    out = jnp.stack(outs)
    if gate is not None:
        out = out * jax.nn.silu(gate.astype(out.dtype))
    return ChunkDecodeOutput(out.astype(v.dtype), cache)
