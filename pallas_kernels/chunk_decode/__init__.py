"""Attention of one new token a row over its chunk's cache, which is updated in place."""

from pallas_kernels.chunk_decode.api import chunk_decode
from pallas_kernels.chunk_decode.types import ChunkDecodeOutput

__all__ = ["ChunkDecodeOutput", "chunk_decode"]
