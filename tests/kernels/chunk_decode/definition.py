"""Chunk decoding in numpy float64, one row at a time, and inputs for it."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_decode import (
    QueryKeyVectors,
    RotaryFactors,
    SharedRepresentation,
    chunk_decode,
)


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


def make_shared(rows, heads, dk, *, is_rotated, eps, seed=0):
    """A shared representation whose queries and keys have about the size 1."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    z = 3 * draw(rows, heads, dk)
    scale, offset = 1 + draw(2, heads, dk) / 4, draw(2, heads, dk) / 4
    scale = scale * jnp.asarray([dk**-0.5, 1])[:, None, None]
    vectors = QueryKeyVectors(scale, offset, swap_pairs(scale), swap_pairs(offset))
    if not is_rotated:
        return SharedRepresentation(z, vectors, eps=eps)
    angle = jnp.repeat(6 * draw(rows, 1, dk // 2), 2, axis=2)
    sign = jnp.tile(jnp.asarray([-1.0, 1.0]), dk // 2)
    rotation = RotaryFactors(jnp.cos(angle), jnp.sin(angle) * sign)
    return SharedRepresentation(z, vectors, swap_pairs(z), rotation, eps)


def shared_shapes(rows, heads, dk, *, eps=1e-5):
    """Shapes of `make_shared` with a rotation."""
    return jax.eval_shape(lambda: make_shared(rows, heads, dk, is_rotated=True, eps=eps))


def swap_pairs(x):
    return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)


def project(shared):
    """Queries and keys in float64: pairs of features as complex numbers, times exp(i angle)."""
    z = np.asarray(shared.z, np.float64)
    if shared.eps is None:
        z = z / (1 + np.exp(-z))
    else:
        z = z / np.sqrt((z * z).mean(axis=-1, keepdims=True) + shared.eps)
    results = []
    for scale, offset in zip(*shared.vectors[:2], strict=True):
        x = z * np.asarray(scale, np.float64) + np.asarray(offset, np.float64)
        if shared.rotation is not None:
            own, other = (np.asarray(factor, np.float64) for factor in shared.rotation)
            turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (own + 1j * other)[..., 1::2]
            x = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
        results.append(x)
    return results
