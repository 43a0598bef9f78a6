"""Chunk decoding with keys and values of 8-bit integers, against a loop in numpy float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_attention import Int8Slots, KeyValueCache
from pallas_kernels.chunk_decode import api, chunk_decode, xla
from pallas_kernels.chunk_decode.block_sizes import DecodeTiling
from pallas_kernels.chunk_decode.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.common.int8 import quantize
from pallas_kernels.common.target import Target
from tests.kernels.chunk_decode.definition import attend, make_inputs
from tests.kernels.chunk_decode.test_in_place import SLOTS, check_in_place, compile_decoding
from tests.topologies import h200_device


def rounded(x):
    """Integers and scales, by numpy in float64."""
    scale = np.abs(x).max(axis=-1) / 127
    return np.round(x / scale[..., None]), scale


def as_slots(x):
    values, scale = rounded(x)
    return Int8Slots(jnp.asarray(values, jnp.int8), jnp.asarray(scale, jnp.float32))


def decoded(slots):
    return np.asarray(slots.values, np.float64) * np.asarray(slots.scale, np.float64)[..., None]


def make_case(rows, heads, slots, dk, dv, *, cache_rows=None, dtype=np.float32, seed=0):
    """Inputs of different sizes by slot, and the cache with scales of NaN where nothing is read."""
    inputs = make_inputs(rows, heads, slots, dk, dv, cache_rows=cache_rows, dtype=dtype, seed=seed)
    sizes = np.exp(np.random.default_rng(seed).normal(size=inputs[3].shape[:3]) / 2)
    inputs[3][:], inputs[4][:] = inputs[3] * sizes[..., None], inputs[4] * sizes[..., None]
    return inputs, KeyValueCache(as_slots(inputs[3]), as_slots(inputs[4]))


def poisoned(cache, positions):
    """A copy with NaN in the scales of all slots that are not filled."""
    scales = []
    for slots in cache:
        scale = np.array(slots.scale)
        scale[len(positions) :] = np.nan
        for row, position in enumerate(positions):
            scale[row, :, position % scale.shape[2] :] = np.nan
        scales.append(jnp.asarray(scale))
    values = (jnp.array(slots.values) for slots in cache)
    return KeyValueCache(*map(Int8Slots, values, scales))


def run(inputs, cache, positions, implementation, dtype, gate=None, decode=chunk_decode):
    q, k, v = (jnp.asarray(a, dtype) for a in inputs[:3])
    gate = None if gate is None else jnp.asarray(gate, dtype)
    if implementation is not None:
        decode = partial(decode, implementation=implementation)
    call = jax.jit(lambda *args: decode(*args, gate=gate), donate_argnums=3)
    cache = poisoned(cache, positions)
    before = [np.array(leaf) for leaf in jax.tree.leaves(cache)]
    out, after = call(q, k, v, cache, jnp.asarray(positions, jnp.int32))
    check_written(before, after, k, v, positions)
    return np.asarray(out).astype(np.float64)


def check_written(before, after, k, v, positions):
    """The new token's slot holds its rounded key and value; nothing else has changed."""
    tokens = jax.tree.leaves((Int8Slots(*quantize(k)), Int8Slots(*quantize(v))))
    for old, new, token in zip(before, jax.tree.leaves(after), tokens, strict=True):
        for row, position in enumerate(positions):
            old[row, :, position % old.shape[2]] = token[row]
        np.testing.assert_array_equal(new, old)


def exact_output(inputs, cache, positions, dtype, gate=None):
    """The definition in float64 over the rounded keys and values, the new token's included."""
    q, *tokens = (np.asarray(jnp.asarray(a, dtype)).astype(np.float64) for a in inputs[:3])
    tokens = [decoded(Int8Slots(*quantize(jnp.asarray(each, jnp.float32)))) for each in tokens]
    return attend(q, *tokens, decoded(cache.key), decoded(cache.value), positions, gate)[0]


@pytest.mark.parametrize("shape", [(5, 37), (2, 3, 128)])
def test_an_element_is_rounded_by_half_a_scale_at_most(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x[0] *= 1e-30
    x[1] = 0
    values, scale = map(np.asarray, quantize(jnp.asarray(x)))
    assert values.dtype == np.int8
    assert (np.abs(values.astype(int)).max(axis=-1) == np.where((x != 0).any(-1), 127, 0)).all()
    error = np.abs(values * scale[..., None].astype(np.float64) - x)
    assert (error <= 0.5001 * scale[..., None]).all()


def test_all_implementations_round_as_numpy_does():
    x = np.random.default_rng(1).normal(size=(64, 96))
    values, scale = rounded(x.astype(np.float32).astype(np.float64))
    got = quantize(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got.scale, scale, rtol=1e-6)
    # A number half-way between two integers may go either way.
    assert np.abs(np.asarray(got.values) - values).max() <= 1
    assert (np.asarray(got.values) != values).mean() < 1e-3


@pytest.mark.parametrize(
    ("implementation", "dtype", "slots", "cache_rows"),
    [
        ("reference", jnp.float32, 48, 7),
        ("xla", jnp.float32, 48, 7),
        # Several blocks of slots.
        ("xla", jnp.float64, 300, 4),
    ],
)
def test_equals_the_definition(implementation, dtype, slots, cache_rows):
    positions = np.array([0, slots - 1, slots, slots + slots // 2])
    inputs, cache = make_case(4, 2, slots, 8, 5, cache_rows=cache_rows)
    gate = inputs[2] / 2
    with jax.enable_x64(True):
        out = run(inputs, cache, positions, implementation, dtype, gate)
    exact = exact_output(inputs, cache, positions, np.float32, gate)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [Target("gpu", "NVIDIA A100-SXM4-80GB"), Target("tpu", "TPU")])
def test_forms_for_other_devices_equal_the_definition(target, monkeypatch):
    monkeypatch.setattr(xla, "find_target", lambda: target)
    positions = np.array([0, 47, 48, 71])
    inputs, cache = make_case(4, 2, 48, 6, 10, cache_rows=5)
    out = run(inputs, cache, positions, "xla", jnp.float32)
    exact = exact_output(inputs, cache, positions, np.float32)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize(
    ("tiling", "slots", "positions"),
    [
        # Value columns of two blocks, several steps, a last split that begins in the one before.
        (DecodeTiling(64, 128, 16, True, 128), 150, (149, 64)),
        pytest.param(
            DecodeTiling(128, 256, 8, False, 128), 150, (149, 64, 63, 0), marks=pytest.mark.slow
        ),
    ],
)
def test_the_kernels_add_in_float32(tiling, slots, positions):
    """The error of the outputs is that of rounding them."""
    positions = np.array(positions)
    rows = len(positions)
    inputs, cache = make_case(
        rows, 1, slots, 64, 256, cache_rows=rows + 1, dtype=jnp.bfloat16, seed=3
    )
    decode = partial(mosaic_gpu.chunk_decode, tiling=tiling)
    out = run(inputs, cache, positions, None, jnp.bfloat16, decode=decode)
    exact = exact_output(inputs, cache, positions, jnp.bfloat16)
    once = exact.astype(jnp.bfloat16).astype(np.float64)
    assert np.linalg.norm(out - exact) <= 1.02 * np.linalg.norm(once - exact)


@pytest.mark.parametrize("width", [64, 2048])
def test_error_of_the_outputs_beside_exact_values(width):
    """Gaussian keys and values, scores of the standard deviation 1; the README has these numbers.

    Scales for groups of 128 of 2,048 columns would give 0.84 of the error for 16 times the scales.
    """
    inputs = make_inputs(4, 1, 256, 64, width)
    inputs[0][:] /= 8
    positions = np.array([255, 200, 100, 31])
    cache = KeyValueCache(as_slots(inputs[3]), as_slots(inputs[4]))
    out = run(inputs, cache, positions, "xla", jnp.float32)
    exact = attend(*inputs, positions)[0]
    error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
    print(f"width {width}: {error:.3%}")
    assert error <= 0.013


def int8_shapes(rows, heads, slots, width):
    shape = (rows, heads, slots)
    return Int8Slots(
        jax.ShapeDtypeStruct((*shape, width), jnp.int8), jax.ShapeDtypeStruct(shape, jnp.float32)
    )


@pytest.mark.parametrize(
    "implementation", ["mosaic_gpu", pytest.param("xla", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_in_place_on_an_h200(implementation):
    """No copy of the cache, and no array of its size in another dtype."""
    check_in_place(
        *compile_decoding(
            h200_device(), jnp.bfloat16, implementation, rows=8, cache_rows=8, layers=2,
            slots=int8_shapes, is_shared=implementation == "mosaic_gpu",
        ),
        # Results of the splits, or scores, of one layer.
        share=0.04,
    )  # fmt: skip


def test_in_place_on_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("compiles for a CPU")
    device = jax.devices("cpu")[0]
    check_in_place(
        *compile_decoding(
            device, jnp.float32, None, rows=2, cache_rows=3, layers=4, slots=int8_shapes
        ),
        # A block of slots is converted to float32, four times its bytes.
        share=0.08,
    )


def test_choice_and_errors(monkeypatch):
    wide = KeyValueCache(*(int8_shapes(2, 1, SLOTS, width) for width in (256, 2048)))
    q, v = (jax.ShapeDtypeStruct((2, 1, width), jnp.bfloat16) for width in (256, 2048))
    monkeypatch.setattr(api, "find_target", lambda: Target("gpu", "NVIDIA H200"))
    assert api._choose_implementation(q, v, wide) == "mosaic_gpu"
    small = jnp.zeros((2, 1, 8))
    key = Int8Slots(jnp.zeros((2, 1, 5, 8), jnp.int8), jnp.zeros((2, 1, 5)))
    for cache, message in (
        (KeyValueCache(key, key.values), "both are Int8Slots, or neither is"),
        (KeyValueCache(key, key._replace(values=jnp.zeros((2, 1, 5, 8)))), "expected int8"),
        (
            KeyValueCache(key, key._replace(scale=jnp.zeros((2, 1, 4)))),
            r"float32\(2, 1, 5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            chunk_decode(small, small, small, cache, jnp.zeros(2, jnp.int32))
