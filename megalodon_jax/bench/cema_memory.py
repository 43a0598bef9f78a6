"""Peak memory of CEMA, forward and backward, as multiples of the input.

    megalodon bench cema_memory            # compiled figures for this backend
    megalodon bench cema_memory --run      # runs too: seconds, peak of the process

The gradient is that of sum(y * cotangent) in x and all parameters, so x, the cotangent and dx are
three of the multiples.
"""

import resource
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from megalodon_jax.bench.options import BenchCemaMemoryOptions
from megalodon_jax.compiled.memory import CompiledMemory, read_memory
from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.common.dispatch import Implementation


class CemaMemory(NamedTuple):
    """Memory of a gradient beside its input.

    Attributes:
      memory: the compiler's account.
      input: bytes of x, the unit of comparison.
    """

    memory: CompiledMemory
    input: int

    @property
    def multiple(self) -> float:
        """The peak over the input."""
        return self.memory.total / self.input


class Shape(NamedTuple):
    """One measured case."""

    rows: int
    length: int
    channels: int
    order: int
    dtype: str
    packed: bool


SHAPES = [
    Shape(1, 16_384, 512, 16, "float32", packed=False),
    Shape(1, 16_384, 512, 16, "float32", packed=True),
    Shape(1, 16_384, 512, 16, "bfloat16", packed=False),
    Shape(8, 2_048, 512, 16, "float32", packed=False),
]


def compile_gradient(
    shape: Shape, implementation: Implementation | None = None
) -> jax.stages.Compiled:
    """Compiles forward and backward for a shape; nothing runs."""

    def loss(x: Array, params: CemaParams, cotangent: Array, segment_ids: Array | None) -> Array:
        y = cema(x, params, segment_ids=segment_ids, implementation=implementation).y
        return jnp.sum(y * cotangent, dtype=jnp.float32)

    x, params, segment_ids = (
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), value)
        for value in jax.eval_shape(lambda: _inputs(shape))
    )
    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.jit(gradient).lower(x, params, x, segment_ids).compile()


def compiled_memory(compiled: jax.stages.Compiled, shape: Shape) -> CemaMemory:
    """The compiler's account of a compiled gradient.

    Raises:
      RuntimeError: the backend reports none.
    """
    memory = read_memory(compiled)
    if memory is None:
        raise RuntimeError(f"backend {jax.default_backend()} reports no memory")
    input_bytes = shape.rows * shape.length * shape.channels * jnp.dtype(shape.dtype).itemsize
    return CemaMemory(memory, input_bytes)


def _inputs(
    shape: Shape,
) -> tuple[Float[Array, "B L D"], CemaParams, Int32[Array, "B L"] | None]:
    keys = jax.random.split(jax.random.key(0), 6)
    matrix, vector = (shape.channels, shape.order), (shape.channels,)
    shapes = (matrix, matrix, vector, (*matrix, 2), vector)
    params = CemaParams(*(jax.random.normal(k, s) for k, s in zip(keys[1:], shapes, strict=True)))
    size = (shape.rows, shape.length, shape.channels)
    x = jax.random.normal(keys[0], size, jnp.dtype(shape.dtype))
    document = jnp.arange(shape.length, dtype=jnp.int32) * 8 // shape.length + 1
    segment_ids = jnp.broadcast_to(document, (shape.rows, shape.length))
    return x, params, segment_ids if shape.packed else None


def run(options: BenchCemaMemoryOptions) -> int:
    """Prints one line per shape; returns 0."""
    print(f"backend {jax.default_backend()}, jax {jax.__version__}")
    for shape in SHAPES:
        compiled = compile_gradient(shape)
        use = compiled_memory(compiled, shape)
        line = (
            f"({shape.rows}, {shape.length}, {shape.channels}) N {shape.order} {shape.dtype}"
            f"{' packed' if shape.packed else ''}: {use.memory.total / 2**20:.0f} MiB = "
            f"{use.multiple:.2f} x input, temporaries "
            f"{use.memory.temporaries / use.input:.2f} x input"
        )
        if options.run:
            x, params, segment_ids = _inputs(shape)
            jax.block_until_ready(compiled(x, params, x, segment_ids))
            start = time.perf_counter()
            jax.block_until_ready(compiled(x, params, x, segment_ids))
            # Linux counts kilobytes, macOS bytes; the peak is that of the process until here.
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            line += f"; {time.perf_counter() - start:.3f} s, process peak {peak / 2**20:.0f} MiB"
        print(line, flush=True)
    return 0
