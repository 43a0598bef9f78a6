"""Chunk attention with a cache of 8-bit integers, against a loop in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_attention import Int8Slots, KeyValueCache, chunk_attention
from pallas_kernels.common.int8 import quantize

C, H, DK, DV = 8, 2, 5, 6
# Rows inside a chunk, at its border, up to its end, into the next one, in a new document, padded.
STARTS = (3, 8, 5, 6, 2, 4)
SEGMENTS = np.array(
    [
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 2, 2, 2, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    np.int32,
)


def positions_of(starts):
    """A second document begins at position 0."""
    positions = np.array(starts)[:, None] + np.arange(SEGMENTS.shape[1])
    second = np.cumsum(SEGMENTS == 2, axis=1) - 1
    return np.where(SEGMENTS == 2, second, positions).astype(np.int32)


def attend(q, k, v, key, value, positions):
    """Outputs, and each row's slots as (index of the token, or None for one of the cache)."""
    out, slots = np.zeros_like(v), []
    for row, segments in enumerate(SEGMENTS):
        filled = dict.fromkeys(range(positions[row, 0] % C))
        for t, segment in enumerate(segments):
            if segment == 0:
                continue
            if positions[row, t] % C == 0:
                filled = {}
            filled[positions[row, t] % C] = t
            for head in range(H):
                tokens = [
                    (key[row, head, j], value[row, head, j]) if s is None
                    else (k[row, s, head], v[row, s, head])
                    for j, s in filled.items()
                ]  # fmt: skip
                scores = np.array([q[row, t, head] @ each for each, _ in tokens])
                weights = np.exp(scores - scores.max())
                values = np.array([each for _, each in tokens])
                out[row, t, head] = weights @ values / weights.sum()
        slots.append(filled)
    return out, slots


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_new_tokens_are_exact_and_old_slots_keep_their_bits(implementation):
    rng = np.random.default_rng(0)
    B, L = SEGMENTS.shape
    q, k = (rng.normal(size=(B, L, H, DK)).astype(np.float32) for _ in range(2))
    v = rng.normal(size=(B, L, H, DV)).astype(np.float32)
    cache = KeyValueCache(
        *(Int8Slots(*quantize(jnp.asarray(rng.normal(size=(B, H, C, d))))) for d in (DK, DV))
    )
    positions = positions_of(STARTS)
    got = jax.jit(
        lambda q, k, v, cache: chunk_attention(
            q, k, v, chunk_size=C, positions=jnp.asarray(positions),
            segment_ids=jnp.asarray(SEGMENTS), cache=cache, implementation=implementation,
        )
    )(q, k, v, cache)  # fmt: skip
    old = [
        np.asarray(slots.values, np.float64) * np.asarray(slots.scale, np.float64)[..., None]
        for slots in cache
    ]
    out, slots = attend(*(np.asarray(a, np.float64) for a in (q, k, v)), *old, positions)
    np.testing.assert_allclose(got.out, out, rtol=1e-5, atol=1e-5)
    rounded = (quantize(jnp.asarray(x)) for x in (k, v))
    for before, after, new in zip(cache, got.cache, rounded, strict=True):
        for row, filled in enumerate(slots):
            if len(filled) == C:
                # The chunk is complete: none of its tokens is seen again.
                continue
            for j, token in filled.items():
                source, at = (
                    (before, (row, slice(None), j)) if token is None else (new, (row, token))
                )
                for got_leaf, leaf in zip(after, source, strict=True):
                    np.testing.assert_array_equal(got_leaf[row, :, j], np.asarray(leaf)[at])
    # A row of padding keeps everything.
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(got.cache), strict=True):
        np.testing.assert_array_equal(before[-1], after[-1])


def test_errors():
    x = jnp.zeros((1, 2, 1, 4))
    slots = Int8Slots(jnp.zeros((1, 1, 3, 4), jnp.int8), jnp.zeros((1, 1, 3)))
    positions = jnp.zeros((1, 2), jnp.int32)
    for cache, message in (
        (KeyValueCache(slots, slots.values), "both are Int8Slots, or neither is"),
        (KeyValueCache(slots, slots._replace(scale=jnp.zeros((1, 1, 4)))), r"float32\(1, 1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            chunk_attention(x, x, x, chunk_size=3, positions=positions, cache=cache)
