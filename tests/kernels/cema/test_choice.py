"""Which implementation and split size CEMA chooses by default."""

from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.cema import CemaParams, api
from pallas_kernels.cema.mosaic_gpu.block_sizes import WARPGROUPS, choose_split_size
from pallas_kernels.chunk_attention import api as attention_api
from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.common.target import Target, find_target
from tests.topologies import compile_for, tpu_device

H200, A100 = Target("gpu", "NVIDIA H200"), Target("gpu", "NVIDIA A100-SXM4-80GB")
V5E, V4 = Target("tpu", "TPU v5 lite"), Target("tpu", "TPU v4")


def make_params(channels: int, dtype=jnp.float32) -> CemaParams:
    shapes = (channels, 4), (channels, 4), (channels,), (channels, 4, 2), (channels,)
    return CemaParams(*(jnp.zeros(shape, dtype) for shape in shapes))


@pytest.mark.parametrize(
    ("target", "length", "dtype", "choice"),
    [
        (H200, 4096, jnp.bfloat16, "mosaic_gpu"),
        (H200, 1, jnp.bfloat16, "xla"),
        (H200, 4096, jnp.float32, "xla"),
        (Target("gpu", "NVIDIA H100 80GB HBM3"), 4096, jnp.bfloat16, "mosaic_gpu"),
        (Target("gpu", "NVIDIA GH200 480GB"), 4096, jnp.bfloat16, "mosaic_gpu"),
        (A100, 4096, jnp.bfloat16, "xla"),
        (V5E, 4096, jnp.bfloat16, "pallas_tpu"),
        (V5E, 4096, jnp.float32, "pallas_tpu"),
        (H200, 100, jnp.bfloat16, "mosaic_gpu"),
        (V5E, 100, jnp.bfloat16, "xla"),
        (V4, 4096, jnp.bfloat16, "xla"),
        (Target("cpu", "cpu"), 4096, jnp.bfloat16, "xla"),
    ],
)
def test_choice_by_device_length_and_dtype(target, length, dtype, choice, monkeypatch):
    monkeypatch.setattr(api, "find_target", lambda: target)
    x = jax.ShapeDtypeStruct((1, length, 8), dtype)
    assert api._choose_implementation(x, make_params(8)) == choice


def test_target_is_the_device_of_the_mesh():
    seen = []

    def look(a):
        seen.append(find_target())
        return a

    compile_for(tpu_device("v5e:1x1"), look, jnp.zeros(8))
    assert seen == [V5E]
    assert find_target().platform == jax.default_backend()


@pytest.mark.parametrize(
    ("rows", "length", "width"), [(1, 16_384, 4096), (8, 2048, 1024), (1, 131_072, 1024)]
)
def test_splits_fill_the_gpu_once(rows, length, width):
    split = choose_split_size(rows, length, width)
    warpgroups = rows * (width // 128) * -(-length // split)
    assert split % 32 == 0
    assert 0.95 * WARPGROUPS <= warpgroups <= WARPGROUPS


def test_short_rows_are_not_split_further():
    assert choose_split_size(1, 256, 128) == 128
    assert choose_split_size(1, 64, 128) == 64
    assert choose_split_size(512, 4096, 1024) == 4096


def test_every_implementation_has_an_entry():
    assert tuple(api.IMPLEMENTATIONS) == get_args(Implementation)
    assert get_args(Implementation) == get_args(api.Implementation)
    assert get_args(Implementation) == get_args(attention_api.Implementation)
