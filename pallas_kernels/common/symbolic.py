"""Shapes that `jax.export` traces without numbers."""

import jax
import jax.export


def has_symbolic_shape(x: jax.Array) -> bool:
    """Whether `jax.export` traces x with a dimension whose size is not a number.

    The grids of kernels need numbers: the default choice of such a trace is `xla`.
    """
    return any(jax.export.is_symbolic_dim(size) for size in x.shape)
