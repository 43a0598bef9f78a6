"""Ceilings: the best memory and matrix product rates of this device, measured."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from megalodon_jax.bench.timing import seconds_per_call


class Ceilings(NamedTuple):
    """Best rates of a device.

    Attributes:
      bytes_per_second: bytes read plus bytes written by an elementwise function of a large array.
      flops_per_second: rate of a large square bfloat16 matrix product of 2 n^3 FLOPs.
    """

    bytes_per_second: float
    flops_per_second: float


def measure_ceilings(*, copied_bytes: int = 2**30, matrix_size: int = 8192) -> Ceilings:
    """Measures both rates on the default device.

    Args:
      copied_bytes: size of the array that is read, and of the array that is written.
      matrix_size: n of the n x n matrices.
    """
    source = jnp.arange(copied_bytes // 4, dtype=jnp.int32)
    copy_seconds = seconds_per_call(jax.jit(jnp.invert), source)
    matrices = (
        jax.random.normal(key, (matrix_size, matrix_size), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0))
    )
    matmul_seconds = seconds_per_call(jax.jit(jnp.matmul), *matrices)
    return Ceilings(2 * source.nbytes / copy_seconds, 2 * matrix_size**3 / matmul_seconds)
