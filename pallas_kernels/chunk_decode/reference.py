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

    def attend(q, k, v, key, value, slot):
        key, value = key.at[:, slot].set(k), value.at[:, slot].set(v)
        is_filled = jnp.arange(num_slots) <= slot
        wide, precision = accumulation_dtype(q.dtype), matmul_precision(q.dtype)
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
        return out, key, value

    slots = positions % num_slots
    key, value = cache
    outs = []
    for row in range(q.shape[0]):
        out, new_key, new_value = attend(q[row], k[row], v[row], key[row], value[row], slots[row])
        key, value = key.at[row].set(new_key), value.at[row].set(new_value)
        outs.append(out)
    out = jnp.stack(outs)
    if gate is not None:
        out = out * jax.nn.silu(gate.astype(out.dtype))
    return ChunkDecodeOutput(out.astype(v.dtype), KeyValueCache(key, value))
