"""The model's modules. Each is usable alone and built from plain sizes."""

from megalodon_jax.modules.attention import AttentionOutput, MegaAttention
from megalodon_jax.modules.bidirectional import BidirectionalCEMA, BidirectionalEMA
from megalodon_jax.modules.block import Block, BlockOutput
from megalodon_jax.modules.cema import CEMA, EMA
from megalodon_jax.modules.documents import document_lengths
from megalodon_jax.modules.embedding import Embedding
from megalodon_jax.modules.feed_forward import FeedForward
from megalodon_jax.modules.heads import Classifier, PairClassifier, Pool
from megalodon_jax.modules.inputs import PatchInput, TokenInput, ValueInput
from megalodon_jax.modules.linear import Linear
from megalodon_jax.modules.norms import LayerNorm, RMSNorm
from megalodon_jax.modules.options import DropoutRates, Implementations
from megalodon_jax.modules.positions import PositionInfo, position_info
from megalodon_jax.modules.rotary import Rotation, rotate, rotation
from megalodon_jax.modules.sequence_norm import SequenceNorm
from megalodon_jax.modules.timestep_norm import TimestepNorm

__all__ = [
    "CEMA",
    "EMA",
    "AttentionOutput",
    "BidirectionalCEMA",
    "BidirectionalEMA",
    "Block",
    "BlockOutput",
    "Classifier",
    "DropoutRates",
    "Embedding",
    "FeedForward",
    "Implementations",
    "LayerNorm",
    "Linear",
    "MegaAttention",
    "PairClassifier",
    "PatchInput",
    "Pool",
    "PositionInfo",
    "RMSNorm",
    "Rotation",
    "SequenceNorm",
    "TimestepNorm",
    "TokenInput",
    "ValueInput",
    "document_lengths",
    "position_info",
    "rotate",
    "rotation",
]
