"""A sequence over several devices, for kernels in an interpreter, which only knows one.

Parts lie along an axis of `jax.vmap`, whose collectives are those of a mesh, and the kernels run
one part after another.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap


def in_turn(launch: Callable[..., Any]) -> Callable[..., Any]:
    """A `launch(kernel, operands, out_type, **options)` that `jax.vmap` runs one after another."""

    def launch_each(kernel, operands, out_type, **options):
        @sequential_vmap
        def run(operands):
            return launch(kernel, operands, out_type, **options)

        return run(operands)

    return launch_each


def to_parts(a: jax.Array | None, parts: int) -> jax.Array | None:
    """(B, L, ...) in parts (S, B, L / S, ...)."""
    if a is None:
        return None
    return jnp.moveaxis(a.reshape(a.shape[0], parts, -1, *a.shape[2:]), 1, 0)


def from_parts(a: jax.Array) -> jax.Array:
    """The inverse of `to_parts`."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])


def at_last_part(a: jax.Array, parts: int) -> jax.Array:
    """A cotangent of the state after a row: only the last part's is the row's."""
    return jnp.stack([*[jnp.zeros_like(a)] * (parts - 1), a])
