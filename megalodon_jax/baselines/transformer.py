"""A Llama-2-shaped Transformer, the model that MEGALODON is compared with.

It has the blocks of Touvron et al. 2023 (arXiv 2307.09288): RMSNorm, rotary positions, SwiGLU, full
or sliding-window causal attention with shared key and value heads (Ainslie et al. 2023). Trainer,
loss, packing, sharding, rematerialization and checkpoints are MEGALODON's. A row's tokens are not
sharded: the mesh axis `chunk` stays 1.
"""

import math
from typing import Any, NamedTuple

from flax import nnx
from jax import numpy as jnp

from megalodon_jax.baselines.attention import causal_attention
from megalodon_jax.baselines.cache import TransformerCache
from megalodon_jax.baselines.cached import cached_attention
from megalodon_jax.config import KvFormat, TransformerConfig, TransformerEncoderConfig
from megalodon_jax.language_model import LanguageModel, ModelInputs, make_output_layer
from megalodon_jax.layer_stack import run_blocks, stack_blocks
from megalodon_jax.modules.activations import silu_gate
from megalodon_jax.modules.dropout import dropout, dtype_before_dropout, fold_key, split_key
from megalodon_jax.modules.embedding import Embedding
from megalodon_jax.modules.linear import Linear, SharedInput
from megalodon_jax.modules.matmul import PRODUCT, PROJECTION
from megalodon_jax.modules.norms import RMSNorm
from megalodon_jax.modules.positions import PositionInfo, after_last_token, document_positions
from megalodon_jax.modules.rotary import rotate, rotation
from megalodon_jax.parallel.sharding import partition_spec, shard_map_logical
from megalodon_jax.typing import Array, Float, Float32, PRNGKey
from pallas_kernels.chunk_attention import KeyValueCache

AnyTransformerConfig = TransformerConfig | TransformerEncoderConfig
# The slots of a growing cache are a multiple: few sizes are compiled, and copies are aligned.
_SLOTS = 128


class TransformerBlockOutput(NamedTuple):
    """A block's output and, when streaming, its keys and values."""

    x: Float[Array, "B L D"]
    cache: KeyValueCache | None


class SelfAttention(nnx.Module):
    """softmax(rotate(n Wq) rotate(n Wk)^T / sqrt(d)) (n Wv) Wo with n = RMSNorm(x), causal.

    Query head h reads key and value head h // (H / K). There are no biases.
    """

    def __init__(self, config: AnyTransformerConfig, *, rngs: nnx.Rngs):
        D, d = config.model_dim, config.head_dim
        self.config = config
        self.norm = make_norm(config)
        self.wq = _linear(config, D, config.num_heads * d, axes=("embed", "query"), rngs=rngs)
        self.wk = _linear(config, D, config.kv_heads * d, axes=("embed", "query"), rngs=rngs)
        self.wv = _linear(config, D, config.kv_heads * d, axes=("embed", "value"), rngs=rngs)
        self.wo = _linear(config, config.num_heads * d, D, axes=("value", "embed"), rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        positions: PositionInfo,
        cache: KeyValueCache | None,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[Float32[Array, "B L D"], KeyValueCache | None]:
        """The sub-layer's output in float32, before the residual is added."""
        inputs_key, output_key = split_key(dropout_key, 2)
        normed = SharedInput(self.norm(x), self.wq, self.wk, self.wv, dropout_key=inputs_key)

        def heads(linear: Linear) -> Array:
            product = linear.product(normed, name=PROJECTION)
            return product.reshape(*x.shape[:2], -1, self.config.head_dim)

        query, key = heads(self.wq), heads(self.wk)
        if positions.rotation is not None:
            query, key = (rotate(each, positions.rotation) for each in (query, key))
        attended, cache = self._attend(
            (query, key, heads(self.wv)), positions, cache, fold_key(dropout_key, 0)
        )
        attended = attended.reshape(*x.shape[:2], -1)
        return self.wo(attended, dropout_key=output_key), cache

    def _attend(
        self,
        qkv: tuple[Array, Array, Array],
        info: PositionInfo,
        cache: KeyValueCache | None,
        dropout_key: PRNGKey | None,
    ) -> tuple[Float[Array, "B L H d"], KeyValueCache | None]:
        del dropout_key  # Llama-2 has no dropout.
        assert isinstance(self.config, TransformerConfig)
        window, implementation = (
            self.config.attention_window, self.config.attention_implementation
        )  # fmt: skip

        def attend(qkv, positions, segment_ids, cache):
            if cache is None:
                return causal_attention(
                    *qkv, window=window, segment_ids=segment_ids, implementation=implementation
                ), None
            query, key, value = qkv
            # A ring has a slot for every token of the window; fewer slots hold a whole document.
            is_wider = window is not None and window > cache.key.shape[2]
            return cached_attention(
                query,
                key,
                value,
                cache,
                positions=positions,
                segment_ids=segment_ids,
                window=None if is_wider else window,
            )

        tokens = partition_spec("batch", "length")
        features = partition_spec("batch", "length", "heads", None)
        slots = partition_spec("batch", "heads", None, None)
        cache_spec = None if cache is None else KeyValueCache(slots, slots)
        return shard_map_logical(
            attend,
            in_specs=(
                (features,) * 3,
                None if info.positions is None else tokens,
                None if info.segment_ids is None else tokens,
                cache_spec,
            ),
            out_specs=(features, cache_spec),
        )(qkv, info.positions, info.segment_ids, cache)


class SwiGLU(nnx.Module):
    """(silu(n W1) * (n W3)) W2 with n = RMSNorm(x) (Shazeer 2020); no biases."""

    def __init__(
        self, config: AnyTransformerConfig, *, hidden_dropout: float = 0.0, rngs: nnx.Rngs
    ):
        D, F = config.model_dim, config.ffn_hidden_dim
        self.config, self.hidden_dropout = config, hidden_dropout
        self.norm = make_norm(config)
        self.fc1 = _linear(config, D, F, axes=("embed", "ffn"), rngs=rngs)
        self.fc2 = _linear(config, F, D, axes=("ffn", "embed"), rngs=rngs)
        self.fc3 = _linear(config, D, F, axes=("embed", "ffn"), rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], *, dropout_key: PRNGKey | None = None
    ) -> Float32[Array, "B L D"]:
        """The sub-layer's output in float32, before the residual is added."""
        inputs_key, output_key = split_key(dropout_key, 2)
        hidden_key = fold_key(dropout_key, 0)
        normed = SharedInput(self.norm(x), self.fc1, self.fc3, dropout_key=inputs_key)
        hidden = silu_gate(
            self.fc1.product(normed, name=PRODUCT),
            None,
            self.fc3.product(normed, name=PRODUCT),
            features="ffn",
            dtype=dtype_before_dropout(self.config.dtype, self.hidden_dropout, hidden_key),
            implementation=self.config.rowwise_implementation,
        )
        hidden = dropout(hidden, self.hidden_dropout, hidden_key)
        return self.fc2(hidden, dropout_key=output_key)


class TransformerBlock(nnx.Module):
    """y = x + attention(x); out = y + feed_forward(y)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.attention = SelfAttention(config, rngs=rngs)
        self.feed_forward = SwiGLU(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        positions: PositionInfo,
        cache: KeyValueCache | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> TransformerBlockOutput:
        """Transforms x; `dropout_key` is for LoRA, because the model itself has no dropout."""
        attention_key, ffn_key = split_key(dropout_key, 2)
        attended, cache = self.attention(
            x, positions=positions, cache=cache, dropout_key=attention_key
        )
        # Sums are rounded once, to the residual stream's dtype.
        y = (x + attended).astype(x.dtype)
        hidden = self.feed_forward(y, dropout_key=ffn_key)
        return TransformerBlockOutput((y + hidden).astype(x.dtype), cache)

    def without_attention(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """out = x + feed_forward(x): the block at inference without its attention."""
        return (x + self.feed_forward(x)).astype(x.dtype)


class Transformer(LanguageModel):
    """Embedding, a stack of Transformer blocks, a final RMSNorm and an output matrix.

    Example:
      model = Transformer(TransformerConfig.from_preset("transformer200M"), rngs=nnx.Rngs(0))
      logits, _ = model(tokens)
    """

    config: TransformerConfig

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding.from_config(config, rngs=rngs)
        self.layers = stack_blocks(
            lambda _, rngs: TransformerBlock(config, rngs=rngs), config.num_layers, rngs=rngs
        )
        self.final_norm = make_norm(config)
        self.output = make_output_layer(config, rngs=rngs)

    def _run(
        self, inputs: ModelInputs, *, hidden_states: bool
    ) -> tuple[Float[Array, "B L D"], Float[Array, "S B L D"] | None, TransformerCache | None]:
        config, shape = self.config, inputs.check(self.config)
        segment_ids, cache = inputs.segment_ids, inputs.cache
        if cache is not None and segment_ids is not None:
            cache = self.start_new_documents(cache, segment_ids)
        positions = document_positions(
            shape,
            segment_ids,
            None if cache is None else cache.position,
        )
        angles = None
        if config.rope_base is not None:
            in_document = jnp.arange(shape[1])[None] if positions is None else positions
            angles = rotation(in_document, config.head_dim, config.rope_base)
        info = PositionInfo(angles, positions, segment_ids)
        x, layers, states = run_blocks(
            self.layers,
            config,
            self._embed_inputs(inputs),
            info,
            cache=None if cache is None else cache.layers,
            dropout_key=inputs.dropout_key,
            hidden_states=hidden_states,
        )
        hidden = self.final_norm(x)
        if cache is None or layers is None:
            return hidden, states, None
        position, segment = after_last_token(info, cache.position, cache.segment)
        return hidden, states, TransformerCache(position, segment, layers, cache.is_ring)

    def init_cache(
        self, batch_size: int, *, max_length: int | None = None, kv: KvFormat = "model"
    ) -> TransformerCache:
        """The cache of `batch_size` rows before their first token.

        Args:
          batch_size: number of rows.
          max_length: most tokens of a document, prompt and answer together. None: only with a
            sliding window, whose cache has one slot for each of its tokens.
          kv: "model": in `config.dtype`; a Transformer has no other format.

        Raises:
          ValueError: full attention without `max_length`, or another format.
        """
        if kv != "model":
            raise ValueError(f"kv is {kv!r}, but a Transformer decodes with 'model' alone")
        window = self.config.attention_window
        if max_length is None and window is None:
            raise ValueError(
                "the cache of full attention grows with the context; pass max_length, the most "
                "tokens of a document"
            )
        is_ring = window is not None and (max_length is None or max_length > window)
        needed = window if is_ring else max_length
        assert needed is not None
        return self._empty_cache(batch_size, math.ceil(needed / _SLOTS) * _SLOTS, is_ring)

    def with_room(self, cache: Any, length: int) -> Any:
        """A cache that has room for `length` more tokens: full attention doubles its slots."""
        if cache.is_ring:
            return super().with_room(cache, length)
        needed = int(cache.position.max()) + length
        num_slots = cache.num_slots
        while num_slots < needed:
            num_slots *= 2
        return cache if num_slots == cache.num_slots else cache.with_slots(num_slots)

    def _initial_rows(self, cache: TransformerCache) -> TransformerCache:
        return self._empty_cache(cache.position.shape[0], cache.num_slots, cache.is_ring)

    def _empty_cache(self, batch_size: int, num_slots: int, is_ring: bool) -> TransformerCache:
        config = self.config
        shape = (batch_size, config.kv_heads, num_slots, config.head_dim)

        def init_layer() -> KeyValueCache:
            return KeyValueCache(*(jnp.zeros(shape, jnp.dtype(config.dtype)) for _ in range(2)))

        position, segment = (jnp.zeros(batch_size, jnp.int32) for _ in range(2))
        layers = tuple(init_layer() for _ in range(config.num_layers))
        return TransformerCache(position, segment, layers, is_ring)


def make_norm(config: AnyTransformerConfig) -> RMSNorm:
    """The norm before a sub-layer, and after the last block."""
    return RMSNorm(
        config.model_dim,
        eps=config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        implementation=config.rowwise_implementation,
    )


def _linear(
    config: AnyTransformerConfig,
    in_features: int,
    out_features: int,
    *,
    axes: tuple[str, str],
    rngs: nnx.Rngs,
) -> Linear:
    return Linear(
        in_features,
        out_features,
        use_bias=False,
        axes=axes,
        init_mode=config.init_mode,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        reduce_dtype=config.reduce_dtype,
        rngs=rngs,
    )
