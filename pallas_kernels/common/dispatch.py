"""Names of implementations, and the check that every operation's `api.py` begins with."""

from collections.abc import Collection
from typing import Literal

import jax
import jax.export

Implementation = Literal["reference", "xla", "mosaic_gpu", "pallas_tpu"]


def check_implementation(
    operation: str, implementation: str | None, known: Collection[str]
) -> None:
    """Raises ValueError, naming the known implementations, if `implementation` is not one of them.

    Args:
      operation: the operation's name, for the message.
      implementation: what was asked for; None asks for the default choice.
      known: names of the operation's implementations.
    """
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"{operation} has no implementation {implementation!r}; "
            f"use one of {', '.join(map(repr, known))} or None"
        )


def has_symbolic_shape(x: jax.Array) -> bool:
    """Whether `jax.export` traces x with a dimension whose size is not a number.

    The grids of kernels need numbers: the default choice of such a trace is `xla`.
    """
    return any(jax.export.is_symbolic_dim(size) for size in x.shape)
