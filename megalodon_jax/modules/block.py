"""One block: gated chunk attention, then a feed-forward network, joined by the two-hop residual."""

from typing import NamedTuple

from flax import nnx

from megalodon_jax.cache import LayerCache
from megalodon_jax.config import ModelConfig
from megalodon_jax.modules.attention import MegaAttention, PositionInfo
from megalodon_jax.modules.dropout import is_dropping, split_key
from megalodon_jax.modules.feed_forward import FeedForward
from megalodon_jax.typing import Array, Float, PRNGKey


class BlockOutput(NamedTuple):
    """A block's output and, when streaming, its new state."""

    x: Float[Array, "B L D"]
    cache: LayerCache | None


class Block(nnx.Module):
    """y = x + attention(x); out = x + feed_forward(y): the second residual skips both hops."""

    def __init__(self, config: ModelConfig, rescale_start: Array | float, *, rngs: nnx.Rngs):
        self.dropout = config.dropout
        self.mega = MegaAttention(config, rngs=rngs)
        self.nffn = FeedForward(config, rescale_start, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        places: PositionInfo,
        *,
        cache: LayerCache | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> BlockOutput:
        """Transforms x (B, L, D); with `cache`, continues the documents it remembers."""
        attention_key, ffn_key = split_key(dropout_key, 2)
        if is_dropping(self.dropout, attention_key):
            attended, cache = self.mega(x, places, cache=cache, dropout_key=attention_key)
            hidden = self.nffn(x + attended, dropout_key=ffn_key)
        else:
            # LayerNorm makes the sum in passing: y is never written.
            product, cache = self.mega.product(x, places, cache=cache, dropout_key=attention_key)
            hidden = self.nffn(x, added=product, offset=self.mega.wh1.offset, dropout_key=ffn_key)
        # Both sub-layers return float32: the sums round once, to the type of the residual stream.
        out = x + hidden
        return BlockOutput(out.astype(x.dtype), cache)
