"""Rotary position embedding (Su et al. 2021) on adjacent pairs of features."""

from typing import NamedTuple

import numpy as np
from jax import numpy as jnp
from jax.typing import DTypeLike

from megalodon_jax.modules.precision import at_least_float32
from megalodon_jax.typing import Array, Float, Float32, Int32


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles; B is 1 if all rows have the same positions."""

    cos: Float32[Array, "B L half"]
    sin: Float32[Array, "B L half"]


def rotary_frequencies(head_dim: int, base: float, dtype: DTypeLike = np.float32) -> np.ndarray:
    """base^(-2j / head_dim) for j = 0 .. head_dim/2 - 1; float32 is rounded as released."""
    powers = base ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return np.ones((), dtype) / powers.astype(dtype)


def rotation(
    positions: Int32[Array, "B L"], head_dim: int, base: float, dtype: DTypeLike = np.float32
) -> Rotation:
    """Angles position * base^(-2j / head_dim) for the pairs j = 0 .. head_dim/2 - 1."""
    angles = positions[..., None].astype(dtype) * rotary_frequencies(head_dim, base, dtype)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B L H d"], by: Rotation) -> Float[Array, "B L H d"]:
    """Rotates each pair (x[2j], x[2j+1]) by its angle, in float32 at least; keeps x's dtype."""
    pairs = x.astype(at_least_float32(x.dtype)).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = by.cos[:, :, None, :], by.sin[:, :, None, :]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
