"""Chunk decoding from the shared representation of queries and keys, against numpy float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_attention import Int8Slots, KeyValueCache
from pallas_kernels.chunk_decode import chunk_decode
from pallas_kernels.chunk_decode.block_sizes import DecodeTiling
from pallas_kernels.chunk_decode.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.common.int8 import quantize
from pallas_kernels.common.target import find_target
from tests.kernels.chunk_decode.definition import attend, make_inputs, make_shared, poison, project
from tests.kernels.chunk_decode.test_int8 import decoded

POSITIONS = np.array([149, 64, 210])
# (heads, Dk, rotation, eps, 8-bit integers); keys of every layout, the last ones in three of it.
CASES = [
    (2, 64, True, 1e-5, False),
    (1, 128, False, None, True),
    (2, 192, True, None, True),
]


@pytest.mark.parametrize(("heads", "dk", "is_rotated", "eps"), [case[:4] for case in CASES])
def test_queries_and_keys_equal_the_definition(heads, dk, is_rotated, eps):
    shared = make_shared(5, heads, dk, is_rotated=is_rotated, eps=eps)
    for got, exact in zip(shared.queries_and_keys(jnp.float32), project(shared), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)
    rounded = jax.jit(lambda shared: shared.queries_and_keys(jnp.bfloat16))(shared)
    assert all(each.dtype == jnp.bfloat16 for each in rounded)


def decode_case(heads, dk, is_rotated, eps, is_int8, decode):
    """Rows at different positions, NaN in every slot that nothing should read."""
    rows, slots, dv = len(POSITIONS), 150, 256
    shared = make_shared(rows, heads, dk, is_rotated=is_rotated, eps=eps)
    _, _, v, *cached = make_inputs(
        rows, heads, slots, dk, dv, cache_rows=rows + 1, dtype=jnp.bfloat16
    )
    v, gate = jnp.asarray(v, jnp.bfloat16), jnp.asarray(v[:, :, ::-1], jnp.bfloat16)
    q, k = (np.asarray(each).astype(np.float64) for each in shared.queries_and_keys(v.dtype))
    token = np.asarray(v).astype(np.float64)
    if is_int8:
        cache = KeyValueCache(*(Int8Slots(*quantize(jnp.asarray(x))) for x in cached))
        cached = [decoded(each) for each in cache]
        k, token = (decoded(Int8Slots(*quantize(jnp.asarray(x)))) for x in (k, token))
        cache = cache._replace(key=cache.key._replace(scale=nan_after(cache.key.scale)))
        cache = cache._replace(value=cache.value._replace(scale=nan_after(cache.value.scale)))
    else:
        poison(*cached, POSITIONS)
        cache = KeyValueCache(*(jnp.asarray(x, jnp.bfloat16) for x in cached))
    before = jax.tree.map(np.array, cache)
    out, after = jax.jit(decode, donate_argnums=3)(
        shared, None, v, cache, jnp.asarray(POSITIONS, jnp.int32), gate
    )
    exact = attend(q, k, token, *cached, POSITIONS, np.asarray(gate).astype(np.float64))[0]
    return shared, v, before, after, np.asarray(out).astype(np.float64), exact


def nan_after(scale):
    scale = np.array(scale)
    poison(scale[..., None], scale[..., None], POSITIONS)
    return jnp.asarray(scale)


def check_written(shared, v, before, after):
    """Values have the bits of plain JAX; a key, whose norm is a sum, is off by a rounding."""
    _, k = shared.queries_and_keys(v.dtype)
    tokens = before.encode(k, v)
    for name, old, new, token in zip(("key", "value"), before, after, tokens, strict=True):
        for row, position in enumerate(POSITIONS):
            slot = (row, slice(None), position % 150)
            for was, now, own in zip(*map(jax.tree.leaves, (old, new, token)), strict=True):
                written, own = np.asarray(now)[slot], np.asarray(own)[row]
                if name == "value":
                    np.testing.assert_array_equal(written, own)
                else:
                    step = 1 if own.dtype == np.int8 else 2**-7 * np.abs(own.astype(np.float64))
                    difference = np.abs(written.astype(np.float64) - own.astype(np.float64))
                    assert (difference <= step).all()
                    if own.dtype == np.int8:
                        difference = difference[~is_tie(np.asarray(k)[row])]
                    assert (difference > 0).mean() <= 0.02
                was[slot] = np.asarray(now)[slot]
        for was, now in zip(*map(jax.tree.leaves, (old, new)), strict=True):
            np.testing.assert_array_equal(was.astype(np.float64), np.asarray(now, np.float64))


def is_tie(vectors):
    """Numbers half-way between two levels: bfloat16 numbers often are, and divisions decide."""
    vectors = vectors.astype(np.float64)
    levels = vectors / np.abs(vectors).max(axis=-1, keepdims=True) * 127
    return np.abs(np.abs(levels) % 1 - 0.5) < 1e-4


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        ("reference", CASES[0]),
        *((name, case) for name in ("xla", "pallas_tpu") for case in CASES[:2]),
    ],
)
@pytest.mark.usefixtures("runnable")
def test_every_implementation_projects(implementation, case):
    if implementation == "pallas_tpu" and find_target().platform == "gpu":
        pytest.skip("the TPU kernel's interpreter runs on a CPU")

    def decode(q, k, v, cache, positions, gate):
        return chunk_decode(q, k, v, cache, positions, gate=gate, implementation=implementation)

    *written, out, exact = decode_case(*case, decode)
    check_written(*written)
    assert np.linalg.norm(out - exact) <= 4e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("case", "tiling"),
    [
        (CASES[0], DecodeTiling(64, 256, 16, True, 256)),
        # Value columns of two blocks, each of which needs the largest magnitude of the row.
        pytest.param(CASES[1], DecodeTiling(64, 128, 16, True, 256, True), marks=pytest.mark.slow),
        # Several groups of scores in a split.
        pytest.param(CASES[2], DecodeTiling(128, 256, 8, False, 256, True), marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("runnable")
def test_kernels_project_and_round(case, tiling):
    *written, out, exact = decode_case(*case, partial(mosaic_gpu.chunk_decode, tiling=tiling))
    check_written(*written)
    once = exact.astype(jnp.bfloat16).astype(np.float64)
    # Queries and keys have a rounding each, which the exact result shares but for its ties.
    assert np.linalg.norm(out - exact) <= 1.1 * np.linalg.norm(once - exact)
