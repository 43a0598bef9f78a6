"""Result of chunk decoding.

B rows, S >= B rows of the cache, H heads, C slots of a chunk, Dk width of a query/key head, Dv
width of a value head.
"""

from typing import NamedTuple

from jaxtyping import Array, Float

from pallas_kernels.chunk_attention.types import KeyValueCache


class ChunkDecodeOutput(NamedTuple):
    """Result of `chunk_decode`.

    Attributes:
      out: weighted values, dtype of v.
      cache: the cache with the new token's key and value in rows 0..B-1.
    """

    out: Float[Array, "B H Dv"]
    cache: KeyValueCache
