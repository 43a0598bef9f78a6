"""Dropout with keys that are passed in: a module holds no random state."""

import jax
from jax import numpy as jnp

from megalodon_jax.config import DType
from megalodon_jax.typing import Array, Float, PRNGKey


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKey | None) -> Float[Array, "..."]:
    """Zeroes a `rate` fraction of x, scales the rest by 1 / (1 - rate); without a key, x itself."""
    if key is None or not is_dropping(rate, key):
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def is_dropping(rate: float, key: PRNGKey | None) -> bool:
    """Whether `dropout` changes anything."""
    return rate != 0.0 and key is not None


def gate_dtype(dtype: DType, rate: float, key: PRNGKey | None) -> DType:
    """Type in which to hand something to `dropout`: float32 if it changes it, else `dtype`.

    A matrix product that follows rounds to `dtype`, so that rounding happens once either way.
    """
    return "float32" if is_dropping(rate, key) else dtype


def split_key(key: PRNGKey | None, count: int) -> list[PRNGKey | None]:
    """`count` independent keys, or as many `None` for no dropout."""
    return [None] * count if key is None else list(jax.random.split(key, count))
