"""Attention of one new token a row over its chunk's cache, which is updated in place."""

from pallas_kernels.chunk_decode.api import chunk_decode
from pallas_kernels.chunk_decode.types import (
    ChunkDecodeOutput,
    QueryKeyVectors,
    RotaryFactors,
    SharedRepresentation,
)

__all__ = [
    "ChunkDecodeOutput",
    "QueryKeyVectors",
    "RotaryFactors",
    "SharedRepresentation",
    "chunk_decode",
]
