"""Dropout with explicit keys: modules hold no random state."""

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike

from megalodon_jax.modules.precision import at_least_float32
from megalodon_jax.typing import Array, Float, PRNGKey

_FOLDED = 1 << 30


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKey | None) -> Float[Array, "..."]:
    """Zeroes a `rate` fraction of x and scales the rest by 1 / (1 - rate); x itself if no key."""
    if key is None or not drops(rate, key):
        return x
    is_kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(is_kept, x / (1.0 - rate), jnp.zeros_like(x))


def drops(rate: float, key: PRNGKey | None) -> bool:
    """Whether `dropout` changes anything."""
    return rate != 0.0 and key is not None


def dtype_before_dropout(dtype: DTypeLike, rate: float, key: PRNGKey | None) -> DTypeLike:
    """The dtype of an activation that goes through `dropout` into a matrix product.

    float32 if dropout rescales it, else `dtype`: the product casts to `dtype`, so that the value is
    rounded once in both cases.
    """
    return at_least_float32(dtype) if drops(rate, key) else dtype


def fold_key(key: PRNGKey | None, number: int) -> PRNGKey | None:
    """A key beside those of `split_key`, which give the same numbers with or without it."""
    # A small number would repeat a key: fold_in(key, i) is split(key)[i].
    return None if key is None else jax.random.fold_in(key, _FOLDED + number)


def split_key(key: PRNGKey | None, count: int) -> list[PRNGKey | None]:
    """`count` independent keys, or as many `None` for no dropout."""
    return [None] * count if key is None else list(jax.random.split(key, count))
