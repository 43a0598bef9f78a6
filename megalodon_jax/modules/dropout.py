"""Dropout with keys that are passed in: a module holds no random state."""

import jax
from jax import numpy as jnp

from megalodon_jax.typing import Array, Float, PRNGKey


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKey | None) -> Float[Array, "..."]:
    """Zeroes a `rate` fraction of x, scales the rest by 1 / (1 - rate); without a key, x itself."""
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def split_key(key: PRNGKey | None, count: int) -> list[PRNGKey | None]:
    """`count` independent keys, or as many `None` for no dropout."""
    return [None] * count if key is None else list(jax.random.split(key, count))
