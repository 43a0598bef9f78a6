"""Causal attention inside chunks of a document, with a cache of the current chunk."""

from pallas_kernels.chunk_attention.api import chunk_attention
from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    ChunkAttentionOutput,
    Int8Slots,
    KeyValueCache,
)

__all__ = [
    "AttentionDropout",
    "ChunkAttentionOutput",
    "Int8Slots",
    "KeyValueCache",
    "chunk_attention",
]
