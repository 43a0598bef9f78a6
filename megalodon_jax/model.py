"""The MEGALODON language model."""

import math

import jax
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.cache import Cache, CarriedState, LayerCache, empty_keys_and_values
from megalodon_jax.config import KvFormat, ModelConfig
from megalodon_jax.language_model import LanguageModel, ModelInputs, make_output_layer
from megalodon_jax.layer_stack import run_blocks, stack_blocks, unstack_layers
from megalodon_jax.layer_variables import merge_layer, split_blocks
from megalodon_jax.modules.block import Block
from megalodon_jax.modules.dropout import dropout, split_key
from megalodon_jax.modules.embedding import Embedding
from megalodon_jax.modules.positions import after_last_token, position_info
from megalodon_jax.modules.time_norm import init_norm_state, normalize, time_norm_from_config
from megalodon_jax.typing import Array, Float, Float32


class Megalodon(LanguageModel):
    """Embedding, a stack of blocks, a final norm (TimestepNorm) and an output matrix.

    The blocks' parameters are stacked along a leading axis and run by one `jax.lax.scan`, so that
    compile time does not grow with depth. The model holds no random state: pass `dropout_key` for
    training with dropout, nothing for inference.

    Example:
      model = Megalodon(ModelConfig.from_preset("mega200M"), rngs=nnx.Rngs(0))
      logits, _ = model(tokens)
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding.from_config(config, rngs=rngs)
        self.layers = stack_blocks(self._make_block, config.num_layers, rngs=rngs)
        self.final_norm = time_norm_from_config(config)
        self.output = make_output_layer(config, rngs=rngs)

    @property
    def piece_length(self) -> int:
        """Most tokens of a long text that go through the model at a time when streaming."""
        return self.config.chunk_size

    def _make_block(self, layer: Float32[Array, ""], rngs: nnx.Rngs) -> Block:
        return Block.from_config(self.config, rescale_start=0.1 * 0.5**layer, rngs=rngs)

    def _run(
        self, inputs: ModelInputs, *, hidden_states: bool
    ) -> tuple[Float[Array, "B L D"], Float[Array, "S B L D"] | None, Cache | CarriedState | None]:
        config, shape = self.config, inputs.check(self.config)
        segment_ids, cache = inputs.segment_ids, inputs.cache
        if cache is not None and segment_ids is not None:
            cache = self.start_new_documents(cache, segment_ids)
        positions = position_info(
            shape,
            chunk_size=config.chunk_size,
            head_dim=config.head_dim,
            rope_base=config.rope_base,
            segment_ids=segment_ids,
            start=None if cache is None else cache.position,
        )
        embed_key, layers_key = split_key(inputs.dropout_key, 2)
        x = self._embed_inputs(inputs)
        if config.scale_emb:
            x = x * jnp.asarray(math.sqrt(config.model_dim), x.dtype)
        x = dropout(x, config.dropout, embed_key)
        x, layer_caches, states = run_blocks(
            self.layers,
            config,
            x,
            positions,
            cache=None if cache is None else cache.layers,
            carries=isinstance(cache, CarriedState),
            dropout_key=layers_key,
            hidden_states=hidden_states,
        )
        hidden, final_norm = normalize(
            self.final_norm,
            x,
            segment_ids=segment_ids,
            initial_state=None if cache is None else cache.final_norm,
        )
        if cache is None or layer_caches is None:
            return hidden, states, None
        position, segment = after_last_token(positions, cache.position, cache.segment)
        if isinstance(cache, CarriedState):
            final_norm = jax.lax.stop_gradient(final_norm)
        kind = type(cache)
        return hidden, states, kind(position, segment, layer_caches, final_norm)

    def init_cache(
        self, batch_size: int, *, max_length: int | None = None, kv: KvFormat = "model"
    ) -> Cache:
        """The cache of `batch_size` rows before their first token.

        Its size does not depend on how many tokens will follow: per row and block, C key and value
        vectors, and float32 norm moments and CEMA states, where the configuration has them.

        Args:
          batch_size: number of rows.
          max_length: changes nothing.
          kv: "model": keys and values in `config.dtype`; "int8": 8-bit integers with a float32
            scale for every token and head, rounded when a call of the model ends or a decoding step
            writes them. The tokens of one call see each other's exact keys and values.

        Raises:
          ValueError: there is no such format.
        """
        del max_length
        config = self.config
        states = (batch_size, 2 * config.cema_ndim, config.model_dim)
        blocks = split_blocks(self.layers)

        def init_layer(layer: nnx.State) -> LayerCache:
            return LayerCache(
                empty_keys_and_values(batch_size, config, kv),
                init_norm_state(merge_layer(blocks, layer, None).mega.timenorm, batch_size),
                None if config.moving_average == "none" else jnp.zeros(states, jnp.float32),
            )

        return Cache(
            position=jnp.zeros(batch_size, jnp.int32),
            segment=jnp.zeros(batch_size, jnp.int32),
            layers=tuple(map(init_layer, unstack_layers(blocks.params, config.num_layers))),
            final_norm=init_norm_state(self.final_norm, batch_size),
        )

    def init_carried_state(self, batch_size: int) -> CarriedState:
        """The state of `batch_size` training rows before their first token (`data.carry_state`).

        Its layout follows `config.scan_layers`. A call of the model takes it as `cache`.
        """
        cache = self.init_cache(batch_size)
        return CarriedState.from_cache(cache, stacked=self.config.scan_layers)

    def _initial_rows(self, cache: Cache | CarriedState) -> Cache | CarriedState:
        rows = cache.position.shape[0]
        if isinstance(cache, CarriedState):
            return self.init_carried_state(rows)
        return self.init_cache(rows)
