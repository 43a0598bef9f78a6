"""Arrays of more than 2^31 elements: the last rows of a long array equal the same rows alone.

A row of 4M tokens over four devices has such arrays on each of them. Only a large GPU holds them.
"""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from pallas_kernels.cema.api import cema
from pallas_kernels.cema.types import CemaParams
from pallas_kernels.chunk_attention.api import chunk_attention
from pallas_kernels.rowwise.api import layer_norm, rms_norm, silu_gate
from pallas_kernels.timestep_norm.api import timestep_norm
from pallas_kernels.timestep_norm.types import TimestepNormState

NEEDED_BYTES = 60e9
TAIL = 4096


def device_memory() -> int:
    if jax.default_backend() != "gpu":
        return 0
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)


pytestmark = pytest.mark.skipif(
    device_memory() < NEEDED_BYTES, reason="needs a GPU with 60 GB of memory for JAX"
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def only_tail(length: int, width: int) -> jax.Array:
    """Zeros (1, length, width) in bfloat16, normally distributed in the last rows."""
    tail = jax.random.normal(jax.random.key(width), (1, TAIL, width), jnp.bfloat16)
    return jnp.pad(tail, ((0, 0), (length - TAIL, 0), (0, 0)))


def tail_of_vjp(function, x, *rest):
    """The last rows of f(x) and of the gradient in x, and the gradients of the other arguments.

    The cotangent is x itself: zero where x is.
    """

    @jax.jit
    def run(x, *rest):
        y, pull_back = jax.vjp(function, x, *rest)
        dx, *others = pull_back(x.astype(y.dtype).reshape(y.shape))
        return (y[:, -TAIL:], dx[:, -TAIL:]), others

    return jax.tree.map(np.asarray, run(x, *rest))


def check(function, x, *rest, tail_function=None):
    """Compares the rows in the long array with the rows alone."""
    assert x.size > 2**31
    found = tail_of_vjp(function, x, *rest)
    expected = tail_of_vjp(tail_function or function, jnp.array(x[:, -TAIL:]), *rest)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = one.astype(np.float32), other.astype(np.float32)
        assert np.abs(other).max() > 0
        distance = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert distance < 1e-2, distance


def test_cema():
    width, length = 1024, 2**21 + 8192
    keys = iter(jax.random.split(jax.random.key(0), 5))
    params = CemaParams(
        alpha=jax.random.normal(next(keys), (width, 16)) * 0.2,
        delta=jax.random.normal(next(keys), (width, 16)) * 0.2,
        theta=jax.random.uniform(next(keys), (width,)),
        gamma=jax.random.normal(next(keys), (width, 16, 2)),
        omega=jax.random.normal(next(keys), (width,)),
    )
    check(lambda x, params: cema(x, params).y, only_tail(length, width), params)


def test_timestep_norm():
    width, length, groups = 1024, 2**21 + 8192, 32
    scale, bias = jnp.full(width, 0.1), jnp.full(width, 0.2)

    def norm(x, scale, bias, state=None):
        return timestep_norm(x, scale, bias, num_groups=groups, initial_state=state).y

    zeros = jnp.zeros((1, groups))
    before = TimestepNormState(jnp.full(1, length - TAIL, jnp.int32), zeros, zeros)
    check(
        norm,
        only_tail(length, width),
        scale,
        bias,
        tail_function=functools.partial(norm, state=before),
    )


def test_chunk_attention():
    width, length, head_dim = 2048, 2**20 + 4096, 256

    def attend(v, *, rows):
        qk = only_tail(rows, head_dim)[:, :, None]
        return chunk_attention(qk, qk, v[:, :, None], chunk_size=2048)[0][:, :, 0]

    check(
        functools.partial(attend, rows=length),
        only_tail(length, width),
        tail_function=functools.partial(attend, rows=TAIL),
    )


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_norms(norm):
    width = 2048
    scale = jnp.full(width, 0.1)
    arguments = (scale,) if norm is rms_norm else (scale, jnp.zeros(width))
    check(
        lambda x, *rest: norm(x, *rest, eps=1e-5, dtype=jnp.bfloat16),
        only_tail(2**20 + 256, width),
        *arguments,
    )


def test_silu_gate():
    check(
        lambda x: silu_gate(x, None, x, dtype=jnp.bfloat16),
        only_tail(2**20 + 256, 2048),
    )
