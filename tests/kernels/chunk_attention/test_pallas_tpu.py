"""Chunk attention's TPU kernels, interpreted, against float64 and the definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_attention import AttentionDropout, KeyValueCache, chunk_attention
from pallas_kernels.chunk_attention.pallas_tpu.op import can_run
from pallas_kernels.common.target import interpreted


def relative(actual, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def draw(seed, B, L, H=2, Dk=8, Dv=12) -> Any:
    """q, k, v and a cotangent."""
    rng = np.random.default_rng(seed)
    shapes = ((B, L, H, Dk), (B, L, H, Dk), (B, L, H, Dv), (B, L, H, Dv))
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def differentiate(arrays, implementation, *, chunk_size, cache=None, **rows):
    """Output, next cache, and gradients by q, k, v and the cache."""

    @jax.jit
    def run(arrays, cache):
        *qkv, cotangent = arrays

        def attend(qkv, cache):
            result = chunk_attention(
                *qkv, chunk_size=chunk_size, cache=cache, implementation=implementation, **rows
            )
            return result.out, result.cache

        out, pull_back, after = jax.vjp(attend, tuple(qkv), cache, has_aux=True)
        return out, after, pull_back(cotangent)

    return jax.tree.map(np.asarray, run(arrays, cache))


def by_kernels(arrays, **options):
    with interpreted():
        return differentiate(arrays, "pallas_tpu", **options)


def exactly(arrays, *, cache=None, **options):
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (arrays, cache))
        return differentiate(double[0], "reference", cache=double[1], **options)


def lay_out(lengths_by_row, L):
    """Segment ids and positions of documents laid end to end; id 0 is padding."""
    ids = np.zeros((len(lengths_by_row), L), np.int32)
    positions = np.zeros_like(ids)
    for row, documents in enumerate(lengths_by_row):
        at = 0
        for number, length in documents:
            ids[row, at : at + length] = number
            positions[row, at : at + length] = np.arange(length)
            at += length
    return ids, positions


def assert_close(got, want, out=1e-6, gradients=5e-6):
    assert relative(got[0], want[0]) <= out
    for a, b in zip(jax.tree.leaves(got[2]), jax.tree.leaves(want[2]), strict=True):
        assert relative(a, b) <= gradients


@pytest.mark.slow
# In blocks of 256 queries and 128 keys: one block, odd rows over many, chunks of whole blocks.
@pytest.mark.parametrize(
    ("B", "L", "C"),
    # Packed documents have odd rows over many blocks too.
    [(2, 65, 32), (2, 600, 130), (1, 513, 256)],
)
def test_aligned_chunks(B, L, C, attend_token_by_token):
    arrays = draw(L, B, L)
    positions = np.tile(np.arange(L, dtype=np.int32), (B, 1))
    got = by_kernels(arrays, chunk_size=C)
    expected = attend_token_by_token(*arrays[:3], C, positions, np.ones_like(positions))
    assert relative(got[0], expected) <= 1e-6
    assert_close(got, exactly(arrays, chunk_size=C))
    again = by_kernels(arrays, chunk_size=C, positions=positions)
    assert_close(again, exactly(arrays, chunk_size=C))


PACKED = (
    [(1, 31), (2, 300), (3, 1), (4, 290)],
    [(0, 40), (1, 129), (0, 20), (2, 333), (0, 178)],
    [(0, 700)],
)


@pytest.mark.slow
def test_packed_documents(attend_token_by_token):
    C, L = 200, 700
    arrays = draw(1, len(PACKED), L)
    ids, positions = lay_out(PACKED, L)
    rows = {"chunk_size": C, "positions": positions, "segment_ids": ids}
    got = by_kernels(arrays, **rows)
    expected = attend_token_by_token(*arrays[:3], C, positions, ids)
    assert relative(got[0], expected) <= 1e-6
    assert_close(got, exactly(arrays, **rows))

    # Padding: output 0, no gradient, whatever it holds.
    padding = (ids == 0)[..., None, None]
    disturbed = by_kernels(tuple(np.where(padding, np.nan, a) for a in arrays), **rows)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(disturbed), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not a[ids == 0].any()


@pytest.mark.slow
def test_documents_are_independent():
    C, L = 200, 400
    ids, positions = lay_out([[(1, 70), (2, 250), (3, 80)]], L)
    rows = {"chunk_size": C, "positions": positions, "segment_ids": ids}
    arrays = draw(2, 1, L)
    # The scores of documents 1 and 3, and between documents, overflow to infinity.
    others = (ids != 2)[..., None, None]
    disturbed = tuple(np.where(others, a * 1e30, a) for a in arrays)
    plain, other = by_kernels(arrays, **rows), by_kernels(disturbed, **rows)
    assert not np.isfinite(other[2][0][0]).all()
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a[ids == 2], b[ids == 2])


@pytest.mark.parametrize("L", [3, 300])
@pytest.mark.slow
def test_cache_and_rows_at_different_positions(L):
    B, C = 3, 140
    arrays = draw(3, B, L)
    rng = np.random.default_rng(4)
    cache = KeyValueCache(
        *(rng.normal(size=(B, 2, C, width)).astype(np.float32) for width in (8, 12))
    )
    positions = np.array([[0], [5], [420 - 2]], np.int32) + np.arange(L, dtype=np.int32)
    ids = np.ones((B, L), np.int32)
    ids[1, 2:] = 2
    positions[1, 2:] = np.arange(L - 2)
    ids[2, L - 1 :] = 0
    options = {"chunk_size": C, "positions": positions, "segment_ids": ids}
    want = exactly(arrays, cache=cache, **options)
    # Slots at or after the position are ignored whatever they hold.
    empty = np.arange(C) >= positions[:, :1] % C
    filled = KeyValueCache(*(np.where(empty[:, None, :, None], np.nan, a) for a in cache))
    got = by_kernels(arrays, cache=filled, **options)
    assert_close(got, want)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_array_equal(a, np.asarray(b, np.float32))


def test_bfloat16():
    C, L = 128, 300
    narrow = tuple(jnp.asarray(a, jnp.bfloat16) for a in draw(5, 1, L))
    got = by_kernels(narrow, chunk_size=C)
    want = exactly(jax.tree.map(lambda a: np.asarray(a, np.float32), narrow), chunk_size=C)
    assert got[0].dtype == jnp.bfloat16
    # Weights, score gradients and results are rounded to 8 bits: 2^-9 each, rms about 0.6 of that.
    assert_close(got, want, out=4e-3, gradients=6e-3)


def test_what_the_kernels_cannot_do_is_refused():
    q, k, v, _ = draw(6, 1, 5)
    drop = AttentionDropout(0.1, jax.random.key(0))
    with pytest.raises(ValueError, match="pallas_tpu has no dropout"):
        chunk_attention(q, k, v, chunk_size=4, dropout=drop, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="pallas_tpu needs a TPU"):
        chunk_attention(q, k, v, chunk_size=4, implementation="pallas_tpu")
    with jax.enable_x64(True):
        double = [jnp.asarray(a, jnp.float64) for a in (q, k, v)]
        with pytest.raises(ValueError, match="q is float64"):
            chunk_attention(*double, chunk_size=4, implementation="pallas_tpu")


def test_chunks_of_published_models_fit_everywhere():
    for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"):
        for heads in ((256, 2048), (256, 1024), (64, 512)):
            q, v = (jax.ShapeDtypeStruct((1, 1, 1, w), jnp.bfloat16) for w in heads)
            assert can_run(q, v, 4096, kind), (kind, heads)
