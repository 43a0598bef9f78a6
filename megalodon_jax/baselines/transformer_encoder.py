"""A Transformer encoder, which MEGALODON's encoder is compared with.

It has the blocks of the causal Transformer with attention that sees both directions: RMSNorm before
each sub-layer, rotary positions, SwiGLU. Inputs, pool, heads, packing, tasks, sharding and
rematerialization are those of `Encoder`.
"""

import math

from flax import nnx

from megalodon_jax.baselines.transformer import (
    SelfAttention,
    SwiGLU,
    TransformerBlockOutput,
    make_norm,
)
from megalodon_jax.config import TransformerEncoderConfig
from megalodon_jax.encoder_model import EncoderModel
from megalodon_jax.modules.drop_path import scale_documents
from megalodon_jax.modules.dropout import dropout, fold_key, split_key
from megalodon_jax.modules.norms import RMSNorm
from megalodon_jax.modules.options import DropoutRates
from megalodon_jax.modules.positions import PositionInfo
from megalodon_jax.modules.precision import at_least_float32
from megalodon_jax.parallel.sharding import (
    fold_in_device_index,
    partition_spec,
    sequence_axis,
    shard_map_logical,
)
from megalodon_jax.typing import Array, Float, Float32, PRNGKey
from pallas_kernels.chunk_attention import AttentionDropout, KeyValueCache, chunk_attention


class NonCausalAttention(SelfAttention):
    """softmax(rotate(n Wq) rotate(n Wk)^T / sqrt(d)) (n Wv) Wo with n = RMSNorm(x).

    A token sees its whole document, or its chunk of the document (`config.chunk_size`).
    """

    config: TransformerEncoderConfig

    def _attend(
        self,
        qkv: tuple[Array, Array, Array],
        info: PositionInfo,
        cache: KeyValueCache | None,
        dropout_key: PRNGKey | None,
    ) -> tuple[Float[Array, "B L H d"], KeyValueCache | None]:
        config = self.config

        def attend(qkv, positions, segment_ids, key) -> Array:
            query, *others = qkv
            wide = at_least_float32(query.dtype)
            query = (query.astype(wide) / math.sqrt(config.head_dim)).astype(query.dtype)
            return chunk_attention(
                query,
                *others,
                chunk_size=config.chunk_size,
                causal=False,
                positions=positions,
                segment_ids=segment_ids,
                dropout=self._attention_dropout(key),
                implementation=config.attention_implementation,
                sequence_axis=sequence_axis(),
            ).out

        tokens = partition_spec("batch", "length")
        features = partition_spec("batch", "length", "heads", None)
        out = shard_map_logical(
            attend,
            in_specs=(
                (features,) * 3,
                None if info.positions is None else tokens,
                None if info.segment_ids is None else tokens,
                None if dropout_key is None else partition_spec(),
            ),
            out_specs=features,
        )(qkv, info.positions, info.segment_ids, dropout_key)
        return out, cache

    def _attention_dropout(self, key: PRNGKey | None) -> AttentionDropout | None:
        rates = DropoutRates.from_config(self.config)
        if key is None or rates.attention == 0.0:
            return None
        return AttentionDropout(
            rate=rates.attention, key=fold_in_device_index(key), mode=rates.attention_mode
        )


class TransformerEncoderBlock(nnx.Module):
    """y = x + attention(x); out = y + feed_forward(y), with dropout of both sums' second terms."""

    def __init__(self, config: TransformerEncoderConfig, *, rngs: nnx.Rngs):
        self.dropout = config.dropout
        self.attention = NonCausalAttention(config, rngs=rngs)
        self.feed_forward = SwiGLU(config, hidden_dropout=config.hidden_dropout, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        positions: PositionInfo,
        cache: KeyValueCache | None = None,
        dropout_key: PRNGKey | None = None,
        path_scales: Float32[Array, "2 B M"] | None = None,
    ) -> TransformerBlockOutput:
        """Transforms x; `path_scales` as in `Block`.

        Raises:
          ValueError: there is a cache.
        """
        if cache is not None:
            raise ValueError("a non-causal block sees the tokens to come: it has no cache")
        attention_key, ffn_key = split_key(dropout_key, 2)
        attended, _ = self.attention(x, positions=positions, cache=None, dropout_key=attention_key)
        y = self._add(x, attended, 0, positions, attention_key, path_scales)
        hidden = self.feed_forward(y, dropout_key=ffn_key)
        return TransformerBlockOutput(
            self._add(y, hidden, 1, positions, ffn_key, path_scales), None
        )

    def _add(
        self,
        x: Array,
        out: Array,
        sub_layer: int,
        positions: PositionInfo,
        key: PRNGKey | None,
        path_scales: Array | None,
    ) -> Float[Array, "B L D"]:
        """The residual stream after a sub-layer, rounded once to its dtype."""
        out = dropout(out, self.dropout, fold_key(key, 1))
        if path_scales is not None:
            out = scale_documents(out, path_scales[sub_layer], positions.segment_ids)
        return (x + out).astype(x.dtype)


class TransformerEncoder(EncoderModel):
    """A Transformer encoder; `EncoderModel` documents what it takes and gives.

    Example:
      config = TransformerEncoderConfig(input="values", model_dim=64, num_heads=2)
      model = TransformerEncoder(config, rngs=nnx.Rngs(0))
      scores = model(jnp.zeros((3, 784, 1)))  # (3, 10)
    """

    config: TransformerEncoderConfig

    def _make_block(self, layer: Float32[Array, ""], rngs: nnx.Rngs) -> TransformerEncoderBlock:
        del layer
        return TransformerEncoderBlock(self.config, rngs=rngs)

    def _make_final_norm(self) -> RMSNorm:
        return make_norm(self.config)
