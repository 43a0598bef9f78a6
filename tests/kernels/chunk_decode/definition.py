"""Chunk decoding in numpy float64, one row at a time, and inputs for it."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_decode import chunk_decode


def make_inputs(rows, heads, slots, dk, dv, *, cache_rows=None, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    cache_rows = rows if cache_rows is None else cache_rows

    def draw(*shape):
        # float64 numbers that every narrower dtype under test holds exactly.
        return rng.normal(size=shape).astype(dtype).astype(np.float64)

    q, k, v = draw(rows, heads, dk), draw(rows, heads, dk), draw(rows, heads, dv)
    return q, k, v, draw(cache_rows, heads, slots, dk), draw(cache_rows, heads, slots, dv)


def attend(q, k, v, key, value, positions, gate=None):
    """The outputs and the caches after the token, in float64."""
    key, value, outs = key.copy(), value.copy(), np.zeros_like(v)
    for row, position in enumerate(positions):
        slot = position % key.shape[2]
        key[row, :, slot], value[row, :, slot] = k[row], v[row]
        for head in range(q.shape[1]):
            scores = key[row, head, : slot + 1] @ q[row, head]
            weights = np.exp(scores - scores.max())
            outs[row, head] = weights @ value[row, head, : slot + 1] / weights.sum()
    if gate is not None:
        outs = outs * gate / (1 + np.exp(-gate))
    return outs, key, value


def run(inputs, positions, implementation, dtype, gate=None):
    q, k, v, key, value = (jnp.asarray(a, dtype) for a in inputs)
    gate = None if gate is None else jnp.asarray(gate, dtype)
    positions = jnp.asarray(positions, jnp.int32)

    def decode(q, k, v, cache, positions, gate):
        return chunk_decode(q, k, v, cache, positions, gate=gate, implementation=implementation)

    cache = KeyValueCache(key, value)
    out, cache = jax.jit(decode, donate_argnums=3)(q, k, v, cache, positions, gate)
    assert out.dtype == cache.key.dtype == cache.value.dtype == dtype
    return tuple(np.asarray(a).astype(np.float64) for a in (out, *cache))


def poison(key, value, positions):
    """NaN in every slot that is not filled, and in the rows beyond those of the positions."""
    for slots in (key, value):
        slots[len(positions) :] = np.nan
        for row, position in enumerate(positions):
            slots[row, :, position % slots.shape[2] :] = np.nan
