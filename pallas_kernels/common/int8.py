"""Numbers as 8-bit integers with a scale for every vector."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

_LARGEST = 127


class QuantizedVectors(NamedTuple):
    """Vectors x ≈ values * scale."""

    values: Int8[Array, "*vectors n"]
    scale: Float32[Array, "*vectors"]


def quantize(x: Float[Array, "*vectors n"]) -> QuantizedVectors:
    """Rounds each vector to 255 levels, symmetric about 0, up to its largest magnitude.

    The error of an element is at most half of its vector's scale. A vector with NaN has the scale
    NaN, one of zeros the scale 0.

    Args:
      x: vectors along the last axis.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / _LARGEST
    levels = jnp.round(wide / jnp.where(scale > 0, scale, 1)[..., None])
    # A rounded scale may put the largest element beyond the last level.
    return QuantizedVectors(jnp.clip(levels, -_LARGEST, _LARGEST).astype(jnp.int8), scale)
