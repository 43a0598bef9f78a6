"""The MEGALODON language model."""

import math
from typing import NamedTuple

import jax
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.cache import Cache, LayerCache
from megalodon_jax.config import ModelConfig
from megalodon_jax.layer_stack import run_blocks, stack_blocks
from megalodon_jax.modules.dropout import dropout, split_key
from megalodon_jax.modules.embedding import Embedding, check_tokens
from megalodon_jax.modules.parameters import axis_names, embedding_initializer
from megalodon_jax.modules.positions import after_last_token, position_info
from megalodon_jax.modules.timestep_norm import TimestepNorm
from megalodon_jax.typing import Array, Bool, Float, Float32, Int32, PRNGKey
from pallas_kernels.chunk_attention import KeyValueCache


class HiddenOutput(NamedTuple):
    """Features after the final norm, and the new cache if one came in."""

    hidden: Float[Array, "B L D"]
    cache: Cache | None


class ModelOutput(NamedTuple):
    """Scores of the next token, and the new cache if one came in."""

    logits: Float32[Array, "B L V"]
    cache: Cache | None


class Megalodon(nnx.Module):
    """Embedding, a stack of blocks, a final TimestepNorm and an output matrix.

    The blocks' parameters are stacked along a leading axis and run by one `jax.lax.scan`, so that
    compile time does not grow with depth. The model holds no random state: pass `dropout_key` for
    training with dropout, nothing for inference.

    Example:
      model = Megalodon(ModelConfig.from_preset("mega200M"), rngs=nnx.Rngs(0))
      logits, _ = model(tokens)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding.from_config(config, rngs=rngs)
        self.layers = stack_blocks(config, rngs=rngs)
        self.final_norm = TimestepNorm.from_config(config)
        self.output = None if config.share_emb else _output_layer(config, rngs)

    def __call__(
        self,
        tokens: Int32[Array, "B L"],
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        cache: Cache | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> ModelOutput:
        """Scores of the token that follows each token.

        Args:
          tokens: token ids in [0, vocab_size), any length L >= 1. An id out of range raises where
            ids are known on the host (numpy); inside `jit` it gives NaN.
          segment_ids: documents of each row, numbered from 1; 0 is padding. Every document is
            computed as if it were alone. None: a row is one document.
          cache: state of the tokens before these; the first document of a row continues it if its
            segment id is the cache's (or segment_ids is None), else starts anew.
          dropout_key: turns dropout on.

        Returns:
          float32 logits (B, L, V) and, if a cache came in, the cache after the last token.
        """
        hidden, cache = self.hidden(
            tokens, segment_ids=segment_ids, cache=cache, dropout_key=dropout_key
        )
        return ModelOutput(self.logits(hidden), cache)

    def hidden(
        self,
        tokens: Int32[Array, "B L"],
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        cache: Cache | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> HiddenOutput:
        """Like calling the model, but stops before the output matrix: (B, L, D)."""
        config = self.config
        check_tokens(tokens, config.vocab_size)
        if cache is not None and segment_ids is not None:
            cache = self._start_new_documents(cache, segment_ids)
        positions = position_info(
            (tokens.shape[0], tokens.shape[1]),
            chunk_size=config.chunk_size,
            head_dim=config.head_dim,
            rope_base=config.rope_base,
            segment_ids=segment_ids,
            start=None if cache is None else cache.position,
        )
        embed_key, layers_key = split_key(dropout_key, 2)
        x = self.embed(tokens)
        if config.scale_emb:
            x = x * jnp.asarray(math.sqrt(config.model_dim), x.dtype)
        x = dropout(x, config.dropout, embed_key)
        x, layer_caches = run_blocks(
            self.layers,
            config,
            x,
            positions,
            cache=None if cache is None else cache.layers,
            dropout_key=layers_key,
        )
        hidden, final_norm = self.final_norm(
            x, segment_ids=segment_ids, initial_state=None if cache is None else cache.final_norm
        )
        if cache is None or layer_caches is None:
            return HiddenOutput(hidden, None)
        position, segment = after_last_token(positions, cache.position, cache.segment)
        return HiddenOutput(hidden, Cache(position, segment, layer_caches, final_norm))

    def logits(self, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Scores from features after the final norm: `config.dtype` products, float32 sums."""
        return jnp.matmul(hidden, self.output_matrix(), preferred_element_type=jnp.float32)

    def output_matrix(self) -> Float[Array, "D V"]:
        """The matrix from features to scores, in `config.dtype`."""
        kernel = self.embed.embedding[...].T if self.output is None else self.output.kernel[...]
        return kernel.astype(self.config.dtype)

    def init_cache(self, batch_size: int) -> Cache:
        """The cache of `batch_size` rows before their first token.

        Its size does not depend on how many tokens will follow: per row and block, C key and value
        vectors in `config.dtype`, and float32 norm moments and complex64 CEMA states.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        slots = (config.num_layers, batch_size, config.chunk_size, config.num_heads)
        graphdef, layers = nnx.split(self.layers)

        def init_norm(layer: nnx.State):
            return nnx.merge(graphdef, layer).mega.timenorm.init_state(batch_size)

        states = (config.num_layers, batch_size, config.model_dim, config.cema_ndim)
        return Cache(
            position=jnp.zeros(batch_size, jnp.int32),
            segment=jnp.zeros(batch_size, jnp.int32),
            layers=LayerCache(
                KeyValueCache(
                    jnp.zeros((*slots, config.head_dim), dtype),
                    jnp.zeros((*slots, config.value_head_dim), dtype),
                ),
                jax.vmap(init_norm)(layers),
                jnp.zeros(states, jnp.complex64),
            ),
            final_norm=self.final_norm.init_state(batch_size),
        )

    def reset_rows(self, cache: Cache, rows: Bool[Array, " B"]) -> Cache:
        """The cache with some rows back at the state before their first token."""
        return cache.replace_rows(rows, self.init_cache(cache.position.shape[0]))

    def _start_new_documents(self, cache: Cache, segment_ids: Int32[Array, "B L"]) -> Cache:
        first = jnp.take_along_axis(segment_ids, jnp.argmax(segment_ids != 0, axis=1)[:, None], 1)
        first = first[:, 0]
        return self.reset_rows(cache, (first != 0) & (first != cache.segment))


def _output_layer(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        config.model_dim,
        config.num_outputs,
        use_bias=False,
        kernel_init=embedding_initializer(config.model_dim),
        rngs=rngs,
        kernel_metadata=axis_names("embed", "vocab"),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
    )
