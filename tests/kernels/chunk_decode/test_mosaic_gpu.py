"""The Hopper kernels in their interpreter: every way to divide slots and value columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_decode.block_sizes import MAX_SPLITS, DecodeTiling, choose_tiling
from pallas_kernels.chunk_decode.mosaic_gpu.op import chunk_decode
from tests.kernels.chunk_decode.definition import attend, make_inputs, poison

pytestmark = pytest.mark.usefixtures("runnable")


@pytest.mark.parametrize(
    ("tiling", "slots", "positions"),
    [
        # Value columns of three blocks, several steps, a last split that begins in the one before.
        (DecodeTiling(64, 128, 16, True, 128), 200, (199, 130, 64, 0)),
        pytest.param(
            DecodeTiling(64, 128, 8, False, 384), 200, (199, 130, 64, 0), marks=pytest.mark.slow
        ),
        # Several groups of scores in a split.
        (DecodeTiling(128, 384, 4, True, 128), 200, (199, 130, 64, 0)),
        (DecodeTiling(192, 384, 4, False, 128), 200, (199, 130, 191, 192)),
        # One split.
        (DecodeTiling(64, 384, 64, True, 128), 64, (63, 64, 32, 15)),
    ],
)
@pytest.mark.slow
def test_tilings(tiling, slots, positions):
    inputs = make_inputs(4, 1, slots, 64, 384, cache_rows=5, dtype=jnp.bfloat16, seed=slots)
    poison(*inputs[3:], positions)
    q, k, v, key, value = (jnp.asarray(a, jnp.bfloat16) for a in inputs)
    positions = np.asarray(positions)
    got = jax.jit(lambda *args: chunk_decode(*args, tiling=tiling))(
        q, k, v, KeyValueCache(key, value), jnp.asarray(positions, jnp.int32)
    )
    exact, *caches = attend(*inputs, positions)
    out = np.asarray(got.out).astype(np.float64)
    # Weights are float32 here: the error is that of rounding the outputs.
    rounded = exact.astype(jnp.bfloat16).astype(np.float64)
    assert np.linalg.norm(out - exact) <= 1.02 * np.linalg.norm(rounded - exact)
    for slots_of_cache, expected in zip(got.cache, caches, strict=True):
        np.testing.assert_array_equal(np.asarray(slots_of_cache).astype(np.float64), expected)


@pytest.mark.slow
def test_wide_keys():
    inputs = make_inputs(1, 1, 70, 512, 128, dtype=jnp.bfloat16)
    inputs[0][:] /= 16
    positions = np.array([69])
    q, k, v, key, value = (jnp.asarray(a, jnp.bfloat16) for a in inputs)
    inputs = tuple(np.asarray(a).astype(np.float64) for a in (q, k, v, key, value))
    got = jax.jit(chunk_decode)(q, k, v, KeyValueCache(key, value), jnp.asarray(positions))
    exact = attend(*inputs, positions)[0]
    rounded = exact.astype(jnp.bfloat16).astype(np.float64)
    error = np.linalg.norm(np.asarray(got.out).astype(np.float64) - exact)
    assert error <= 1.02 * np.linalg.norm(rounded - exact)


@pytest.mark.parametrize("num_heads", [1, 2, 8, 64, 256, 1024])
@pytest.mark.parametrize(
    ("slots", "width"), [(64, 128), (65, 384), (2048, 2048), (4096, 2048), (8191, 640)]
)
def test_chosen_tilings_cover_every_slot_and_column(num_heads, slots, width):
    tiling = choose_tiling(num_heads, slots, width)
    splits = tiling.count_splits(slots)
    assert splits <= MAX_SPLITS
    assert splits * tiling.slots_per_block >= slots >= tiling.slots_per_block
    assert tiling.slots_per_block % 64 == 0
    assert width % tiling.value_tile == width % tiling.combine_tile == 0
    assert tiling.slots_per_block % tiling.slots_per_step == 0


def test_few_rows_make_enough_blocks():
    """A row of mega200M alone gives almost two blocks to every multiprocessor."""
    for rows, value_tile in ((1, 256), (2, 256), (8, 1024), (64, 2048)):
        tiling = choose_tiling(rows, 2048, 2048)
        assert tiling.value_tile == value_tile
        assert rows * tiling.count_splits(2048) * (2048 // value_tile) >= 256
