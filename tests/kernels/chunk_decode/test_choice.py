"""Errors of chunk decoding."""

from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_decode import api, chunk_decode
from pallas_kernels.common.dispatch import Implementation


def decode(*, q=(2, 1, 8), k=(2, 1, 8), v=(2, 1, 128), key=(2, 1, 5, 8), value=(2, 1, 5, 128),
           positions=(2,), cache_dtype=jnp.float32, implementation=None):  # fmt: skip
    cache = KeyValueCache(jnp.zeros(key, cache_dtype), jnp.zeros(value, cache_dtype))
    q, k, v = jnp.zeros(q), jnp.zeros(k), jnp.zeros(v)
    return jax.eval_shape(
        lambda: chunk_decode(
            q, k, v, cache, jnp.zeros(positions, jnp.int32), implementation=implementation
        )
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
        ({"implementation": "cuda"}, "chunk decoding has no implementation 'cuda'"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        decode(**arguments)


def test_implementations_have_the_common_names():
    assert set(api.IMPLEMENTATIONS) <= set(get_args(Implementation))
