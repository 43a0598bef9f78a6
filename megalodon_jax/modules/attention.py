"""Gated chunk attention behind a moving average, the first hop of a block."""

import math
from typing import NamedTuple

from flax import nnx
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from megalodon_jax.cache import LayerCache
from megalodon_jax.config import ModelConfig
from megalodon_jax.modules.activations import silu, silu_gate
from megalodon_jax.modules.cema import CEMA
from megalodon_jax.modules.dropout import dropout, gate_dtype, split_key
from megalodon_jax.modules.linear import PRODUCT, PROJECTION, Linear
from megalodon_jax.modules.norms import RMSNorm, rms_normalize
from megalodon_jax.modules.parameters import parameter
from megalodon_jax.modules.rotary import Rotation, rotate
from megalodon_jax.modules.timestep_norm import TimestepNorm
from megalodon_jax.parallel.sharding import (
    fold_in_device_index,
    partition_spec,
    sequence_axis,
    shard_map_logical,
)
from megalodon_jax.typing import Array, Float, Int32, PRNGKey
from pallas_kernels.chunk_attention import (
    AttentionDropout,
    ChunkAttentionOutput,
    KeyValueCache,
    chunk_attention,
)


class PositionInfo(NamedTuple):
    """Where the tokens of a call stand: what every layer needs to know beside their features.

    Attributes:
      rotation: rotary angles of every token's position in its chunk.
      positions: position of every token in its document; None: 0..L-1 in every row.
      segment_ids: document of every token, 0 for padding; None: a row is one document.
    """

    rotation: Rotation
    positions: Int32[Array, "B L"] | None
    segment_ids: Int32[Array, "B L"] | None


class AttentionOutput(NamedTuple):
    """The output, before the residual is added, and the layer's new streaming state."""

    out: Float[Array, "B L D"]
    cache: LayerCache | None


class MegaAttention(nnx.Module):
    """Moving-average equipped gated attention (Ma et al. 2024, section 3.4, as released).

    u = TimestepNorm(x), m = RMSNorm(CEMA(u)); queries and keys come from m by one shared
    projection, values from u, the gate r and the linear path from m:
    out = m Wh1 + bh1 + (softmax(q k^T) v * r) Wh2.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, Z, E = config.model_dim, config.z_dim, config.value_dim
        self.config = config
        self.timenorm = TimestepNorm(config)
        self.cema = CEMA(config, rngs=rngs)
        self.rmsnorm = RMSNorm(config)
        self.wv = Linear(config, D, E, ("embed", "value"), use_bias=True, rngs=rngs)
        self.wz = Linear(config, D, Z, ("embed", "query"), use_bias=True, rngs=rngs)
        self.wr = Linear(config, D, E, ("embed", "value"), use_bias=True, rngs=rngs)
        self.wh1 = Linear(config, D, D, ("embed", "embed_out"), use_bias=True, rngs=rngs)
        self.wh2 = Linear(config, E, D, ("value", "embed"), use_bias=False, rngs=rngs)
        self.gamma = parameter(jnp.zeros((2, Z), config.param_dtype), None, "query")
        self.beta = parameter(jnp.zeros((2, Z), config.param_dtype), None, "query")

    def __call__(
        self,
        x: Float[Array, "B L D"],
        places: PositionInfo,
        *,
        cache: LayerCache | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> AttentionOutput:
        """Attends within chunks, in float32; with `cache`, continues it and returns the new one."""
        output_key = split_key(dropout_key, 4)[3]
        product, cache = self.product(x, places, cache=cache, dropout_key=dropout_key)
        out = self.wh1.add_bias(product)
        return AttentionOutput(dropout(out, self.config.dropout, output_key), cache)

    def product(
        self,
        x: Float[Array, "B L D"],
        places: PositionInfo,
        *,
        cache: LayerCache | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> AttentionOutput:
        """The output in `config.dtype` before the bias of wh1, and before dropout on it."""
        config = self.config
        hidden_key, attention_key, gate_key, _ = split_key(dropout_key, 4)
        u, norm_state = self.timenorm(
            x, segment_ids=places.segment_ids, state=None if cache is None else cache.norm
        )
        averaged, cema_state = self.cema(
            u, segment_ids=places.segment_ids, state=None if cache is None else cache.cema
        )
        m = dropout(self.rmsnorm(averaged), config.hidden_dropout, hidden_key)
        query, key = self._queries_and_keys(m, places.rotation)
        value = silu(
            self.wv.product(u, name=PROJECTION),
            self.wv.offset,
            features="value",
            dtype=config.dtype,
            implementation=config.implementation_of("rowwise"),
        )
        value = value.reshape(*u.shape[:2], config.num_heads, config.value_head_dim)
        attended, keys_and_values = self._attend(
            (query, key, value),
            places,
            None if cache is None else cache.keys_and_values,
            attention_key,
        )
        gated = silu_gate(
            self.wr.product(m, name=PROJECTION),
            self.wr.offset,
            attended.reshape(*u.shape[:2], -1),
            features="value",
            dtype=gate_dtype(config.dtype, config.hidden_dropout, gate_key),
            implementation=config.implementation_of("rowwise"),
        )
        gated = dropout(gated, config.hidden_dropout, gate_key)
        product = checkpoint_name(self.wh1.product(m) + self.wh2.product(gated), PRODUCT)
        new_cache = None
        if cache is not None and keys_and_values is not None:
            new_cache = LayerCache(keys_and_values, norm_state, cema_state)
        return AttentionOutput(product, new_cache)

    def _queries_and_keys(self, m: Float[Array, "B L D"], by: Rotation) -> tuple[Array, Array]:
        config = self.config
        heads = (config.num_heads, config.head_dim)
        z = rms_normalize(
            self.wz(m, name=PROJECTION).reshape(*m.shape[:2], *heads), config.norm_eps
        )
        # As released, both sides carry 1/sqrt(d), and the scores get no scale of their own.
        scale = (1.0 + self.gamma[...].astype(z.dtype)) / math.sqrt(config.head_dim)
        offset = self.beta[...].astype(z.dtype)
        query, key = (
            rotate(z * scale[i].reshape(heads) + offset[i].reshape(heads), by).astype(config.dtype)
            for i in (0, 1)
        )
        return query, key

    def _attend(
        self,
        heads: tuple[Array, Array, Array],
        places: PositionInfo,
        cache: KeyValueCache | None,
        key: PRNGKey | None,
    ) -> ChunkAttentionOutput:
        config = self.config

        def attend(heads, positions, segment_ids, cache, key) -> ChunkAttentionOutput:
            return chunk_attention(
                *heads,
                chunk_size=config.chunk_size,
                positions=positions,
                segment_ids=segment_ids,
                cache=cache,
                dropout=self._attention_dropout(key),
                implementation=config.implementation_of("attention"),
                sequence_axis=sequence_axis(),
            )

        tokens, slots = (
            partition_spec("batch", "length"),
            partition_spec("batch", None, "heads", None),
        )
        features = partition_spec("batch", "length", "heads", None)
        caches = None if cache is None else KeyValueCache(slots, slots)
        return shard_map_logical(
            attend,
            inputs=(
                (features,) * 3,
                None if places.positions is None else tokens,
                None if places.segment_ids is None else tokens,
                caches,
                None if key is None else partition_spec(),
            ),
            outputs=ChunkAttentionOutput(features, caches),
        )(heads, places.positions, places.segment_ids, cache, key)

    def _attention_dropout(self, key: PRNGKey | None) -> AttentionDropout | None:
        if key is None or self.config.attention_dropout == 0.0:
            return None
        return AttentionDropout(
            rate=self.config.attention_dropout,
            key=fold_in_device_index(key),
            mode=self.config.attention_dropout_mode,
        )
