"""One kernel of a decoding step as `bench decode_kernels` measures it: operands, program, error.

A program calls the operation once for each of several arrays, caches or matrices, in turn. Between
calls is a `jax.lax.optimization_barrier`, which costs no kernel: it keeps the compiler from joining
products of the same rows, and from computing once what a step computes in every layer.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from megalodon_jax.bench.options import DecodeKernel
from pallas_kernels.chunk_decode.block_sizes import DecodeTiling
from pallas_kernels.skinny_matmul.block_sizes import WideTiling


class Variant(NamedTuple):
    """An implementation, and its tiling where it is not the chosen one."""

    implementation: Literal["mosaic_gpu", "xla"]
    tiling: DecodeTiling | WideTiling | None = None


class Operands(NamedTuple):
    """Arguments of a program: arrays that it reads, and those that it updates in place."""

    fixed: Any
    donated: Any


class KernelErrors(NamedTuple):
    """Distance of one call's results from those of `xla` in float32.

    Attributes:
      relative: L2 distance from the expected results, rounded to the dtype of the results once.
      differing: numbers of the caches that are not bit for bit those of `xla`; 0 without a cache.
    """

    relative: float
    differing: int = 0


class KernelCase(Protocol):
    """One operation of a decoding step with its sizes."""

    @property
    def op(self) -> DecodeKernel: ...
    @property
    def call(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def arrays(self) -> int:
        """Caches or matrices that a program reads in turn."""
        ...

    @property
    def calls(self) -> int:
        """Calls of the operation in a program."""
        ...

    @property
    def array_bytes(self) -> int:
        """Bytes that one call reads of its cache or matrix."""
        ...

    @property
    def least_bytes(self) -> int:
        """Bytes of all operands read and all results written once, in one call."""
        ...

    def make_operands(self) -> Operands: ...
    def program(self, variant: Variant) -> Callable[[Any, Any], tuple[Any, Any]]:
        """The measured function: (fixed, donated) to (results, the next donated)."""
        ...

    def measure_error(self, variant: Variant) -> KernelErrors: ...
    def tilings(self) -> list[DecodeTiling] | list[WideTiling]:
        """Tilings of `mosaic_gpu` around the chosen one."""
        ...


def relative_error(found: Any, exact: Any) -> float:
    """L2 distance of all arrays from the expected ones, rounded to the dtype of each once."""
    wide = [
        (a.astype(jnp.float32), b.astype(a.dtype).astype(jnp.float32))
        for a, b in zip(found, exact, strict=True)
    ]
    distance = sum(float(jnp.sum(jnp.square(a - b))) for a, b in wide)
    return math.sqrt(distance / sum(float(jnp.sum(jnp.square(b))) for _, b in wide))


@partial(jax.jit, static_argnums=(1, 2, 3))
def random_array(
    seed: Any, shape: tuple[int, ...], dtype: Any, deviation: float = 1.0
) -> jax.Array:
    """A large array on the device: integers -127 to 127, or uniform numbers about 0."""
    key = jax.random.key(seed, impl="rbg")
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    bound = 3**0.5 * deviation
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """A small array, made by the host: nothing is compiled."""
    return jnp.asarray(rng.standard_normal(shape, np.float32).astype(dtype))
