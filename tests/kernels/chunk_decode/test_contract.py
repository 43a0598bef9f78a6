"""Contract of chunk decoding over all implementations, against attention in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_decode import chunk_decode
from pallas_kernels.chunk_decode.api import IMPLEMENTATIONS
from pallas_kernels.chunk_decode.block_sizes import SCORE_SLOTS
from tests.kernels.chunk_decode.definition import attend, make_inputs, poison, run

pytestmark = pytest.mark.usefixtures("runnable")


# The Hopper kernels take bfloat16, keys of a multiple of 64 numbers, values of 128, and 64 slots.
# Those for TPU take float32 too, with the error of their running sum.
WIDE = [name for name in IMPLEMENTATIONS if name not in ("mosaic_gpu", "pallas_tpu")]
SLOW_KERNELS = [
    *WIDE, "pallas_tpu", pytest.param("mosaic_gpu", marks=pytest.mark.slow)
]  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize(
    ("heads", "slots", "dk", "dv", "cache_rows"),
    [(1, 5, 4, 6, 4), (2, 48, 8, 5, 7), (3, 130, 3, 10, 4), (1, 300, 16, 8, 5)],
)
@pytest.mark.parametrize("implementation", WIDE)
def test_equals_the_definition(implementation, heads, slots, dk, dv, cache_rows, dtype):
    positions = np.array([0, slots - 1, slots, slots + 1])
    inputs = make_inputs(4, heads, slots, dk, dv, cache_rows=cache_rows)
    poison(*inputs[3:], positions)
    with jax.enable_x64(True):
        got = run(inputs, positions, implementation, dtype)
    for value, expected in zip(got, attend(*inputs, positions), strict=True):
        tolerance = 1e-13 if dtype == jnp.float64 else 2e-6
        np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", SLOW_KERNELS)
@pytest.mark.parametrize(
    ("heads", "slots", "cache_rows"), [(1, 5, 4), (2, 48, 7), (3, 130, 4), (1, 300, 5)]
)
def test_bfloat16_has_the_error_of_its_roundings(implementation, heads, slots, cache_rows):
    """Weights and outputs are rounded to bfloat16 once each."""
    if implementation == "mosaic_gpu" and slots < SCORE_SLOTS:
        pytest.skip("the kernels need more slots")
    positions = np.array([0, slots - 1, slots, 3 * slots + slots // 2])
    inputs = make_inputs(
        4, heads, slots, 64, 256, cache_rows=cache_rows, dtype=jnp.bfloat16, seed=slots
    )
    poison(*inputs[3:], positions)
    out, key, value = run(inputs, positions, implementation, jnp.bfloat16)
    exact, *caches = attend(*inputs, positions)
    np.testing.assert_array_equal(key, caches[0])
    np.testing.assert_array_equal(value, caches[1])
    assert np.linalg.norm(out - exact) <= 3e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gate(implementation):
    positions, gates = np.array([69, 30]), np.array([-1e30, -3, -0.5, 0, 0.5, 3, 90, 200] * 16)
    inputs = make_inputs(2, 1, 70, 64, 128, dtype=jnp.bfloat16)
    gate = np.broadcast_to(gates, (2, 1, 128)).astype(jnp.bfloat16).astype(np.float64)
    out = run(inputs, positions, implementation, jnp.bfloat16, gate)[0]
    with np.errstate(over="ignore"):
        exact = attend(*inputs, positions, gate)[0]
    np.testing.assert_allclose(out, exact, rtol=1e-2, atol=1e-2)
    assert np.linalg.norm(out - exact) <= 3e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("scale", "implementation"),
    [
        *((scale, name) for scale in (0.0, 1e4) for name in (*WIDE, "pallas_tpu")),
        (1e4, "mosaic_gpu"),
        pytest.param(0.0, "mosaic_gpu", marks=pytest.mark.slow),
    ],
)
def test_extreme_scores(implementation, scale):
    """Equal scores give the mean of the values; one far greater than the others its value."""
    slots, positions = 130, np.array([129, 77])
    q, k, v, key, value = make_inputs(2, 1, slots, 64, 128, dtype=jnp.bfloat16)
    q = np.sign(q) * scale
    key[:, :, 60] = np.sign(q)
    out = run((q, k, v, key, value), positions, implementation, jnp.bfloat16)[0]
    exact = attend(q, k, v, key, value, positions)[0]
    assert np.linalg.norm(out - exact) <= 3e-3 * np.linalg.norm(exact)
    if scale:
        np.testing.assert_array_equal(out, value[:, :, 60])


@pytest.mark.parametrize("implementation", SLOW_KERNELS)
def test_tokens_one_by_one_equal_the_definition_over_two_chunks(implementation):
    """Rows at different positions in a scan, from an empty (NaN) cache."""
    rows, heads, slots, dk, dv, steps = 2, 1, 5, 64, 128, 12
    start = np.array([0, 3])
    if implementation == "mosaic_gpu":
        slots, start = 66, start + 61
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(steps, rows, heads, width)).astype(jnp.bfloat16).astype(np.float64)
        for width in (dk, dk, dv)
    )
    key, value = (
        np.full((rows, heads, slots, dk), np.nan),
        np.full((rows, heads, slots, dv), np.nan),
    )
    for row, position in enumerate(start):
        key[row, :, :position], value[row, :, :position] = 0.5, -1.0

    @jax.jit
    def decode(q, k, v, cache, positions):
        def step(carry, token):
            cache, positions = carry
            out, cache = chunk_decode(*token, cache, positions, implementation=implementation)
            return (cache, positions + 1), out

        return jax.lax.scan(step, (cache, positions), (q, k, v))[1]

    args = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v, key, value)]
    cache = KeyValueCache(*args[3:])
    got = np.asarray(decode(*args[:3], cache, jnp.asarray(start, jnp.int32)), np.float64)
    for step in range(steps):
        exact, key, value = attend(q[step], k[step], v[step], key, value, start + step)
        assert np.linalg.norm(got[step] - exact) <= 3e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("implementation", SLOW_KERNELS)
def test_a_row_does_not_depend_on_its_neighbours(implementation):
    positions = np.array([77, 20, 3])
    q, k, v, key, value = make_inputs(3, 2, 78, 64, 128, dtype=jnp.bfloat16)
    plain = run((q, k, v, key, value), positions, implementation, jnp.bfloat16)[0]
    for array in (q, k, v, key, value):
        array[1] = np.nan
    disturbed = run((q, k, v, key, value), positions, implementation, jnp.bfloat16)[0]
    assert np.isnan(disturbed[1]).all()
    np.testing.assert_array_equal(plain[[0, 2]], disturbed[[0, 2]])
