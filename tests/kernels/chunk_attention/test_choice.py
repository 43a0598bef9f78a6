"""The implementation of chunk attention that is chosen by default."""

from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chunk_attention import AttentionDropout, api
from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.common.target import Target

V5E, V4 = Target("tpu", "TPU v5 lite"), Target("tpu", "TPU v4")


@pytest.mark.parametrize(
    ("target", "length", "width", "dtype", "rate", "choice"),
    [
        ("NVIDIA H200", 2048, 256, jnp.bfloat16, 0.0, "mosaic_gpu"),
        ("NVIDIA H100 80GB HBM3", 2048, 256, jnp.bfloat16, 0.0, "mosaic_gpu"),
        ("NVIDIA H200", 1, 256, jnp.bfloat16, 0.0, "xla"),
        ("NVIDIA H200", 2048, 320, jnp.bfloat16, 0.0, "xla"),
        ("NVIDIA H200", 2048, 256, jnp.float32, 0.0, "xla"),
        ("NVIDIA H200", 2048, 256, jnp.bfloat16, 0.1, "xla"),
        ("NVIDIA A100-SXM4-80GB", 2048, 256, jnp.bfloat16, 0.0, "xla"),
    ],
)
def test_choice_on_gpus(target, length, width, dtype, rate, choice, monkeypatch):
    monkeypatch.setattr(api, "find_target", lambda: Target("gpu", target))
    q, v = (jax.ShapeDtypeStruct((1, length, 4, w), dtype) for w in (width, 2048))
    drop = AttentionDropout(rate, jax.random.key(0))
    assert api._choose_implementation(q, v, 4096, drop) == choice


@pytest.mark.parametrize(
    ("target", "length", "chunk_size", "rate", "choice"),
    [
        (V5E, 4096, 2048, 0.0, "pallas_tpu"),
        (V5E, 4096, 2048, 0.1, "xla"),
        (V5E, 1, 2048, 0.0, "xla"),
        (V5E, 2**20, 2**20, 0.0, "xla"),
        (V4, 4096, 2048, 0.0, "xla"),
        (Target("tpu", "TPU of the future"), 4096, 2048, 0.0, "xla"),
        (Target("cpu", "cpu"), 4096, 2048, 0.0, "xla"),
    ],
)
def test_choice_elsewhere(target, length, chunk_size, rate, choice, monkeypatch):
    monkeypatch.setattr(api, "find_target", lambda: target)
    q, v = (jax.ShapeDtypeStruct((1, length, 4, w), jnp.bfloat16) for w in (256, 2048))
    drop = AttentionDropout(rate, jax.random.key(0))
    assert api._choose_implementation(q, v, chunk_size, drop) == choice


def test_implementations_have_the_common_names():
    assert set(api.IMPLEMENTATIONS) <= set(get_args(Implementation))
