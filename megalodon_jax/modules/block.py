"""One block: gated chunk attention, then a feed-forward network, joined by two residuals."""

from typing import NamedTuple, Self, get_args

from flax import nnx

from megalodon_jax.cache import LayerCache
from megalodon_jax.config import ModelConfig, ResidualConnection
from megalodon_jax.modules.attention import MegaAttention
from megalodon_jax.modules.drop_path import scale_documents
from megalodon_jax.modules.dropout import split_key
from megalodon_jax.modules.feed_forward import FeedForward
from megalodon_jax.modules.positions import PositionInfo
from megalodon_jax.typing import Array, Float, Float32, Int32, PRNGKey


class BlockOutput(NamedTuple):
    """A block's output and, when streaming, its new state."""

    x: Float[Array, "B L D"]
    cache: LayerCache | None


class Block(nnx.Module):
    """y = x + attention(x); out = x + feed_forward(y): the second residual skips both sub-layers.

    Args:
      mega: the attention.
      nffn: the feed-forward network, of the same width.
      residual_connection: "two_hop", as above, or "pre_norm": out = y + feed_forward(y).

    Example:
      block = Block(
          MegaAttention(64, z_dim=32, value_dim=128, chunk_size=256, rngs=rngs),
          FeedForward(64, 160, rngs=rngs),
      )
      y = block(x).x
    """

    def __init__(
        self,
        mega: MegaAttention,
        nffn: FeedForward,
        *,
        residual_connection: ResidualConnection = "two_hop",
    ):
        if residual_connection not in get_args(ResidualConnection):
            raise ValueError(
                f"residual_connection is {residual_connection!r}; use 'two_hop' or 'pre_norm'"
            )
        self.mega = mega
        self.nffn = nffn
        self.residual_connection: ResidualConnection = residual_connection

    @classmethod
    def from_config(
        cls, config: ModelConfig, *, rescale_start: Array | float = 0.0, rngs: nnx.Rngs
    ) -> Self:
        """A block of a model; `rescale_start` depends on its depth, see `FeedForward`."""
        return cls(
            MegaAttention.from_config(config, rngs=rngs),
            FeedForward.from_config(config, rescale_start=rescale_start, rngs=rngs),
            residual_connection=config.residual_connection,
        )

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        positions: PositionInfo | None = None,
        cache: LayerCache | None = None,
        dropout_key: PRNGKey | None = None,
        path_scales: Float32[Array, "2 B M"] | None = None,
    ) -> BlockOutput:
        """Transforms x (B, L, D); arguments as in `MegaAttention`.

        `path_scales` are factors of the outputs of both sub-layers for every document, from
        `draw_path_scales`; they need `positions`.
        """
        attention_key, ffn_key = split_key(dropout_key, 2)
        attended = self.mega(
            x, segment_ids=segment_ids, positions=positions, cache=cache, dropout_key=attention_key
        )
        ids = None if positions is None else positions.segment_ids
        if path_scales is not None:
            scaled = scale_documents(attended.out, path_scales[0], ids)
            attended = attended._replace(product=scaled, bias=None)
        # LayerNorm's kernel forms y = x + attention(x), so y is never stored.
        hidden = self.nffn(x, added=attended.product, offset=attended.bias, dropout_key=ffn_key)
        if path_scales is not None:
            hidden = scale_documents(hidden, path_scales[1], ids)
        # The network returns float32: the sum is rounded once, to the residual stream's dtype.
        out = x + hidden
        if self.residual_connection == "pre_norm":
            out = out + attended.out
        return BlockOutput(out.astype(x.dtype), attended.cache)

    def without_attention(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """out = x + feed_forward(x): the block at inference without its first sub-layer."""
        return (x + self.nffn(x)).astype(x.dtype)
