"""Errors of chunk decoding."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_decode import api, chunk_decode
from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.common.target import Target, find_target, interpreted
from tests.kernels.chunk_decode.definition import make_shared


def decode(*, q=(2, 1, 8), k=(2, 1, 8), v=(2, 1, 128), key=(2, 1, 5, 8), value=(2, 1, 5, 128),
           positions=(2,), gate=None, cache_dtype=jnp.float32, implementation=None):  # fmt: skip
    cache = KeyValueCache(jnp.zeros(key, cache_dtype), jnp.zeros(value, cache_dtype))
    q, k, v = jnp.zeros(q), jnp.zeros(k), jnp.zeros(v)
    gate = None if gate is None else jnp.zeros(gate)
    positions = jnp.zeros(positions, jnp.int32)
    return jax.eval_shape(
        lambda: chunk_decode(q, k, v, cache, positions, gate=gate, implementation=implementation)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": (2, 1, 4)}, r"q, k, v have shapes \(2, 1, 4\), \(2, 1, 8\)"),
        ({"v": (2, 2, 128)}, r"expected \(B, H, Dk\), \(B, H, Dk\), \(B, H, Dv\)"),
        ({"positions": (2, 1)}, r"positions is int32\(2, 1\); expected int32\(2,\)"),
        ({"key": (1, 1, 5, 8), "value": (1, 1, 5, 128)}, "S >= 2 rows"),
        ({"key": (2, 5, 1, 8)}, r"cache.key is float32\(2, 5, 1, 8\); expected float32\(2, 1, 1"),
        ({"value": (3, 1, 5, 128)}, r"cache.value is float32\(3, 1, 5, 128\)"),
        ({"cache_dtype": jnp.bfloat16}, "cache.key is bfloat16"),
        ({"gate": (2, 128)}, r"gate is float32\(2, 128\); expected float32\(2, 1, 128\)"),
        ({"implementation": "cuda"}, "chunk decoding has no implementation 'cuda'"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        decode(**arguments)


@pytest.mark.parametrize(
    ("change", "k", "message"),
    [
        ({}, (2, 1, 8), "k is an array beside a SharedRepresentation"),
        ({"rotation": None}, None, "a rotation needs both"),
        ({"z": (2, 8)}, None, r"z and v have shapes \(2, 8\), \(2, 1, 128\)"),
        (
            {"swapped_z": (2, 1, 4)},
            None,
            r"swapped_z is float32\(2, 1, 4\); expected float32\(2, 1,",
        ),
        ({"z": (2, 1, 4), "swapped_z": (2, 1, 4)}, None, r"scale is float32\(2, 1, 8\); expected"),
    ],
)
def test_errors_of_shared_representations(change, k, message):
    change = {name: None if shape is None else jnp.zeros(shape) for name, shape in change.items()}
    shared = dataclasses.replace(make_shared(2, 1, 8, is_rotated=True, eps=None), **change)
    cache = KeyValueCache(jnp.zeros((2, 1, 5, 8)), jnp.zeros((2, 1, 5, 128)))
    k = None if k is None else jnp.zeros(k)
    with pytest.raises(ValueError, match=message):
        chunk_decode(shared, k, jnp.zeros((2, 1, 128)), cache, jnp.zeros(2, jnp.int32))


def test_queries_need_keys():
    with pytest.raises(ValueError, match="k is None; give keys, or a SharedRepresentation"):
        chunk_decode(jnp.zeros((2, 1, 8)), None, *[None] * 3)  # pyright: ignore[reportArgumentType]


H200, A100 = Target("gpu", "NVIDIA H200"), Target("gpu", "NVIDIA A100-SXM4-80GB")
BF16 = jnp.bfloat16


@pytest.mark.parametrize(
    ("target", "dk", "dv", "slots", "dtype", "choice"),
    [
        (H200, 256, 2048, 2048, BF16, "mosaic_gpu"),
        (H200, 64, 128, 65, BF16, "mosaic_gpu"),
        (H200, 256, 2048, 2048, jnp.float32, "xla"),
        (H200, 96, 2048, 2048, BF16, "xla"),
        (H200, 256, 192, 2048, BF16, "xla"),
        (H200, 576, 2048, 2048, BF16, "xla"),
        (H200, 256, 2048, 63, BF16, "xla"),
        (A100, 256, 2048, 2048, BF16, "xla"),
        (Target("gpu", "several devices"), 256, 2048, 2048, BF16, "xla"),
        (Target("cpu", "cpu"), 256, 2048, 2048, BF16, "xla"),
        (Target("tpu", "TPU v5"), 256, 2048, 2048, BF16, "pallas_tpu"),
        (Target("tpu", "TPU v5 lite"), 96, 192, 63, jnp.float32, "pallas_tpu"),
        (Target("tpu", "TPU v5"), 256, 2**14, 2048, BF16, "xla"),
        # No estimate.
        (Target("tpu", "TPU v3"), 256, 2048, 2048, BF16, "xla"),
    ],
)
def test_choice_by_device_widths_and_dtype(target, dk, dv, slots, dtype, choice, monkeypatch):
    monkeypatch.setattr(api, "find_target", lambda: target)
    q, v, key, value = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in ((2, 1, dk), (2, 1, dv), (2, 1, slots, dk), (2, 1, slots, dv))
    )
    assert api._choose_implementation(q, v, KeyValueCache(key, value)) == choice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "chunk decoding: mosaic_gpu takes bfloat16, q and v are float32 and float32"),
        ({"dtype": BF16}, "needs one row, queries of a multiple of 64 numbers"),
        ({"dtype": BF16, "dk": 1024}, "queries of up to 512 numbers in registers, these have 1024"),
        ({"dtype": BF16, "dk": 64}, "needs at least 64 slots, the cache has 5"),
    ],
)
def test_what_kernels_cannot_take_is_refused_by_name(arguments, message):
    dk, dtype = arguments.get("dk", 8), arguments.get("dtype", jnp.float32)
    q, v = jnp.zeros((1, 1, dk), dtype), jnp.zeros((1, 1, 128), dtype)
    cache = KeyValueCache(jnp.zeros((1, 1, 5, dk), dtype), jnp.zeros((1, 1, 5, 128), dtype))
    with interpreted(), pytest.raises(ValueError, match=message):
        chunk_decode(q, q, v, cache, jnp.zeros(1, jnp.int32), implementation="mosaic_gpu")


def test_what_the_tpu_kernel_cannot_take_is_refused_by_name():
    for width, dtype, message in (
        (2**14, BF16, "pallas_tpu keeps blocks of 128 slots in VMEM, which 8 \\+ 16384 numbers"),
        (8, jnp.float16, "pallas_tpu takes bfloat16 or float32, q and v are float16"),
    ):
        q, v = jnp.zeros((1, 1, 8), dtype), jnp.zeros((1, 1, width), dtype)
        cache = KeyValueCache(jnp.zeros((1, 1, 5, 8), dtype), jnp.zeros((1, 1, 5, width), dtype))
        with interpreted(), pytest.raises(ValueError, match=message):
            chunk_decode(q, q, v, cache, jnp.zeros(1, jnp.int32), implementation="pallas_tpu")


def test_kernels_are_refused_elsewhere():
    if find_target().is_hopper:
        pytest.skip("is about other devices")
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper GPU, this is"):
        decode(implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="pallas_tpu needs a TPU, this is"):
        decode(implementation="pallas_tpu")


def test_implementations_have_the_common_names():
    assert set(api.IMPLEMENTATIONS) <= set(get_args(Implementation))
