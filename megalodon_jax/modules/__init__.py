"""The model's parts, each usable alone."""

from megalodon_jax.modules.attention import AttentionOutput, MegaAttention, PositionInfo
from megalodon_jax.modules.block import Block, BlockOutput
from megalodon_jax.modules.cema import CEMA
from megalodon_jax.modules.feed_forward import FeedForward
from megalodon_jax.modules.norms import LayerNorm, RMSNorm
from megalodon_jax.modules.rotary import Rotation, rotate, rotation
from megalodon_jax.modules.timestep_norm import TimestepNorm

__all__ = [
    "CEMA",
    "AttentionOutput",
    "Block",
    "BlockOutput",
    "FeedForward",
    "LayerNorm",
    "MegaAttention",
    "PositionInfo",
    "RMSNorm",
    "Rotation",
    "TimestepNorm",
    "rotate",
    "rotation",
]
