"""Peak memory of CEMA, forward and backward, as multiples of the input.

    python -m megalodon_jax.bench.cema_memory            # compiled figures for this backend
    python -m megalodon_jax.bench.cema_memory --run      # runs too: seconds, peak of the process

The gradient is that of sum(y * cotangent) in x and all parameters, so x, the cotangent and dx are
three of the multiples.
"""

import argparse
import resource
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.common.dispatch import Implementation


class MemoryUse(NamedTuple):
    """What the compiler sets aside, in bytes.

    Attributes:
      arguments: x, the cotangent and the parameters.
      outputs: the loss and the gradients.
      temporaries: everything else, at its peak.
      input: x alone, the unit of comparison.
    """

    arguments: int
    outputs: int
    temporaries: int
    input: int

    @property
    def peak(self) -> int:
        """Bytes needed at once."""
        return self.arguments + self.outputs + self.temporaries

    @property
    def multiple(self) -> float:
        """The peak over the input."""
        return self.peak / self.input


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


def compiled_memory(compiled: jax.stages.Compiled, shape: Shape) -> MemoryUse:
    """Reads the compiler's own account of a compiled gradient.

    Raises:
      RuntimeError: the backend gives none.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"backend {jax.default_backend()} gives no memory analysis")
    return MemoryUse(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        input=shape.rows * shape.length * shape.channels * jnp.dtype(shape.dtype).itemsize,
    )


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


def main() -> None:
    """Prints one line per shape."""
    parser = argparse.ArgumentParser(description="peak memory of CEMA, forward and backward")
    parser.add_argument("--run", action="store_true", help="run each case too")
    arguments = parser.parse_args()
    print(f"backend {jax.default_backend()}, jax {jax.__version__}")
    for shape in SHAPES:
        compiled = compile_gradient(shape)
        use = compiled_memory(compiled, shape)
        line = (
            f"({shape.rows}, {shape.length}, {shape.channels}) N {shape.order} {shape.dtype}"
            f"{' packed' if shape.packed else ''}: {use.peak / 2**20:.0f} MiB = "
            f"{use.multiple:.2f} x input, of it temporaries {use.temporaries / use.input:.2f}"
        )
        if arguments.run:
            x, params, segment_ids = _inputs(shape)
            jax.block_until_ready(compiled(x, params, x, segment_ids))
            start = time.perf_counter()
            jax.block_until_ready(compiled(x, params, x, segment_ids))
            # Linux counts kilobytes, macOS bytes; the peak is that of the process so far.
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            line += f"; {time.perf_counter() - start:.3f} s, process peak {peak / 2**20:.0f} MiB"
        print(line, flush=True)


if __name__ == "__main__":
    main()
