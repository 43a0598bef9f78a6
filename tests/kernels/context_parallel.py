"""Context parallelism for kernels in an interpreter, which runs on one device only.

Sequence shards lie along an axis of `jax.vmap`, whose collectives are those of a mesh, and the
kernels run one shard after another.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap


def one_shard_at_a_time(launch: Callable[..., Any]) -> Callable[..., Any]:
    """A `launch(kernel, operands, out_type, **options)` that `jax.vmap` runs shard after shard."""

    def launch_each(kernel, operands, out_type, **options):
        @sequential_vmap
        def run(operands):
            return launch(kernel, operands, out_type, **options)

        return run(operands)

    return launch_each


def to_shards(a: jax.Array | None, num_shards: int) -> jax.Array | None:
    """(B, L, ...) in sequence shards (S, B, L / S, ...)."""
    if a is None:
        return None
    return jnp.moveaxis(a.reshape(a.shape[0], num_shards, -1, *a.shape[2:]), 1, 0)


def from_shards(a: jax.Array) -> jax.Array:
    """The inverse of `to_shards`."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])


def at_last_shard(a: jax.Array, num_shards: int) -> jax.Array:
    """A cotangent of the final state: the last shard's state is the row's."""
    return jnp.stack([*[jnp.zeros_like(a)] * (num_shards - 1), a])
