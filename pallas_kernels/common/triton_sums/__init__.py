"""Sums of what the programs of a Triton kernel found: gradients of vectors."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.common import triton

MODULE = "pallas_kernels.common.triton_sums.kernels"
# Partial sums that are loaded together, and columns of a program: 128 bytes of each.
ROWS, COLUMNS = 64, 32


def sum_partials(partials: Float32[Array, "n *S"], *, interpret: bool) -> Float32[Array, "*S"]:
    """Sums over the first axis, in one kernel and always in the same order.

    A compiler's reduction of 128 partial sums of 8,192 numbers took 10.5 us on an H200.

    Args:
      partials: one from each program.
      interpret: whether Triton's interpreter runs the kernel.
    """
    num_partials, shape = partials.shape[0], partials.shape[1:]
    flat = partials.reshape(num_partials, -1)
    if num_partials == 1:
        return partials[0]
    width = flat.shape[1]
    (sums,) = triton.launch(
        triton.load_kernels(MODULE, interpret=interpret).sum_partials,
        [flat, num_partials],
        [jax.ShapeDtypeStruct((width,), jnp.float32)],
        grid=(-(-width // COLUMNS),),
        constants={"WIDTH": width, "ROWS": ROWS, "COLUMNS": COLUMNS},
        interpret=interpret,
    )
    return sums.reshape(shape)


def sum_pairs(
    partials: Float32[Array, "n 2 D"], *, interpret: bool
) -> tuple[Float32[Array, " D"], Float32[Array, " D"]]:
    """As `sum_partials`, of two vectors, which need no slices then."""
    num_partials, _, width = partials.shape
    vector = jax.ShapeDtypeStruct((width,), jnp.float32)
    first, second = triton.launch(
        triton.load_kernels(MODULE, interpret=interpret).sum_pairs,
        [partials, num_partials],
        [vector, vector],
        grid=(-(-width // COLUMNS), 2),
        constants={"WIDTH": width, "ROWS": ROWS, "COLUMNS": COLUMNS},
        interpret=interpret,
    )
    return first, second
