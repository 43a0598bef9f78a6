"""Arguments and results of chunk decoding.

B rows, S >= B rows of the cache, H heads, C slots of a chunk, Dk width of a query/key head, Dv
width of a value head.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.chunk_attention.types import KeyValueCache


class ChunkDecodeOutput(NamedTuple):
    """Result of `chunk_decode`.

    Attributes:
      out: weighted values, dtype of v.
      cache: the cache with the new token's key and value in rows 0..B-1.
    """

    out: Float[Array, "B H Dv"]
    cache: KeyValueCache


class QueryKeyVectors(NamedTuple):
    """Scale and offset that make queries (index 0) and keys (index 1) from the normalized z.

    Attributes:
      scale: of a feature.
      offset: of a feature.
      other_scale: of the other feature in its rotary pair.
      other_offset: of the other feature.
    """

    scale: Float32[Array, "2 H Dk"]
    offset: Float32[Array, "2 H Dk"]
    other_scale: Float32[Array, "2 H Dk"]
    other_offset: Float32[Array, "2 H Dk"]


class RotaryFactors(NamedTuple):
    """Factors of a feature and of the other one in its pair: one pass, without a transposition."""

    own: Float32[Array, "B 1 Dk"]
    other: Float32[Array, "B 1 Dk"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedRepresentation:
    """The shared representation z of a token, from which its query and its key are made.

    With n(z) = z / sqrt(mean(z²) + eps) by head, or silu(z) if eps is None (Ma et al. 2024, section
    3.3, as released):

        x = n(z) * scale + offset,    rotated = x * own + x of the other in the pair * other

    Attributes:
      z: the projection, before its norm.
      vectors: scales and offsets.
      swapped_z: z with the two features of every rotary pair exchanged; None without rotation.
      rotation: rotary factors of the tokens; None without rotary embedding.
      eps: added to the mean square of a head; None: silu takes the norm's place.
    """

    z: Float32[Array, "B H Dk"]
    vectors: QueryKeyVectors
    swapped_z: Float32[Array, "B H Dk"] | None = None
    rotation: RotaryFactors | None = None
    eps: float | None = dataclasses.field(default=None, metadata={"static": True})

    def queries_and_keys(
        self, dtype: jnp.dtype
    ) -> tuple[Float[Array, "B H Dk"], Float[Array, "B H Dk"]]:
        """Queries and keys after RoPE, computed in float32 and rounded to `dtype` once."""
        normed = [self.z] if self.swapped_z is None else [self.z, self.swapped_z]
        if self.eps is not None:
            mean_square = jnp.square(self.z).mean(axis=-1, keepdims=True)
            factor = jax.lax.rsqrt(mean_square + self.eps)
            normed = [each * factor for each in normed]
        else:
            normed = list(map(jax.nn.silu, normed))

        def transform(
            scale: Array, offset: Array, other_scale: Array, other_offset: Array
        ) -> Array:
            projected = normed[0] * scale + offset
            if self.rotation is None:
                return projected
            other = normed[1] * other_scale + other_offset
            return projected * self.rotation.own + other * self.rotation.other

        query, key = (transform(*vectors) for vectors in zip(*self.vectors, strict=True))
        return query.astype(dtype), key.astype(dtype)


def swap_pairs(x: Float[Array, "*N Dk"]) -> Float[Array, "*N Dk"]:
    """The two features of every rotary pair exchanged."""
    return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)


def query_of(q: Float[Array, "B H Dk"] | SharedRepresentation, v: Float[Array, "B H Dv"]) -> Any:
    """The queries, or their shape and dtype if they are not made yet; keys have the same."""
    return jax.ShapeDtypeStruct(q.z.shape, v.dtype) if isinstance(q, SharedRepresentation) else q
