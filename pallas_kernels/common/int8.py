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
    scale = scale_for(jnp.max(jnp.abs(wide), axis=-1))
    return QuantizedVectors(round_to_levels(wide, scale[..., None]).astype(jnp.int8), scale)


def scale_for(greatest: Float32[Array, "*vectors"]) -> Float32[Array, "*vectors"]:
    """Scales of vectors with these greatest magnitudes."""
    return greatest / _LARGEST


def round_to_levels(
    x: Float32[Array, "*vectors n"], scale: Float32[Array, "*#vectors"]
) -> Float32[Array, "*vectors n"]:
    """x / scale as whole numbers -127 to 127, in float32; kernels call this too.

    Args:
      x: vectors.
      scale: of `scale_for`; broadcasts to x.
    """
    levels = jnp.round(x / jnp.where(scale > 0, scale, 1))
    # A rounded scale may put the largest element beyond the last level.
    return jnp.clip(levels, -_LARGEST, _LARGEST)
