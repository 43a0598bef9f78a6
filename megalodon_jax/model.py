"""The MEGALODON language model."""

import math
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.cache import Cache, LayerCache
from megalodon_jax.config import ModelConfig, Remat
from megalodon_jax.modules.attention import PositionInfo
from megalodon_jax.modules.block import Block
from megalodon_jax.modules.dropout import dropout, split_key
from megalodon_jax.modules.linear import GATHERED, PRODUCT, PROJECTION, WEIGHT
from megalodon_jax.modules.parameters import axis_names, embedding_initializer
from megalodon_jax.modules.rotary import rotation
from megalodon_jax.modules.timestep_norm import TimestepNorm
from megalodon_jax.parallel.sharding import (
    axis_size,
    constrain,
    has_multiple_devices,
    partition_spec,
    sequence_axis,
    shard_map_logical,
)
from megalodon_jax.typing import Array, Bool, Float, Float32, Int32, PRNGKey
from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.common import context_parallel
from pallas_kernels.common.residuals import Operation

# What the backward pass of a block finds beside the block's input; it computes the rest again.
# States gathered from other devices are small, and never gathered twice.
SAVED_NAMES: dict[Remat, tuple[str, ...]] = {
    "none": (PROJECTION, PRODUCT, GATHERED, *get_args(Operation)),
    "inputs": (PRODUCT, "chunk_attention", "context_parallel"),
    "dots": (PROJECTION, PRODUCT, "context_parallel"),
    "block": ("context_parallel",),
}


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
        initializer = embedding_initializer(config.model_dim)
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.embed = nnx.Embed(
            config.vocab_size,
            config.model_dim,
            embedding_init=initializer,
            rngs=rngs,
            embedding_metadata=axis_names("vocab", "embed"),
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.layers = _stacked_blocks(config, rngs)
        self.final_norm = TimestepNorm(config)
        self.output = (
            None
            if config.share_emb
            else nnx.Linear(
                config.model_dim,
                config.num_outputs,
                use_bias=False,
                kernel_init=initializer,
                rngs=rngs,
                kernel_metadata=axis_names("embed", "vocab"),
                dtype=dtype,
                param_dtype=param_dtype,
            )
        )

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
        positions = _document_positions(tokens.shape, segment_ids, cache)
        angles_at = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        places = PositionInfo(
            rotation(angles_at % config.chunk_size, config.head_dim, config.rope_base),
            positions,
            segment_ids,
        )
        embed_key, layers_key = split_key(dropout_key, 2)
        x = self._embedded(tokens)
        if config.scale_emb:
            x = x * jnp.asarray(math.sqrt(config.model_dim), x.dtype)
        x = dropout(x, config.dropout, embed_key)
        x, layer_caches = self._run_layers(x, places, cache, layers_key)
        hidden, final_state = self.final_norm(
            x, segment_ids=segment_ids, state=None if cache is None else cache.final_norm
        )
        if cache is None or layer_caches is None or positions is None:
            return HiddenOutput(hidden, None)
        position, segment = _after_last_token(cache, positions, segment_ids)
        return HiddenOutput(hidden, Cache(position, segment, layer_caches, final_state))

    def _embedded(self, tokens: Int32[Array, "B L"]) -> Float[Array, "B L D"]:
        def look_up(table: Array, tokens: Array) -> Array:
            if not has_multiple_devices():
                return jnp.take(table, tokens, axis=0)
            # Every device has some of the vocabulary, and gives what channels are not its own away.
            if axis_size("data") > 1:
                table = jax.lax.all_gather(table, "data", axis=1, tiled=True)
            own = tokens - jax.lax.axis_index("model") * table.shape[0]
            is_own = (own >= 0) & (own < table.shape[0])
            x = jnp.where(is_own[..., None], jnp.take(table, jnp.where(is_own, own, 0), axis=0), 0)
            if axis_size("model") > 1:
                x = jax.lax.psum_scatter(x, "model", scatter_dimension=2, tiled=True)
            is_known = (tokens >= 0) & (tokens < self.config.vocab_size)
            return jnp.where(is_known[..., None], x, jnp.nan)

        x = shard_map_logical(
            look_up,
            inputs=(partition_spec("vocab", "embed"), partition_spec("batch", "length")),
            outputs=partition_spec("batch", "length", "channels"),
        )(self.embed.embedding[...], tokens)
        # Rounded after it, so that the gradient of a token that comes often adds up in float32.
        return x.astype(self.config.dtype)

    def logits(self, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Scores from features after the final norm: `config.dtype` products, float32 sums."""
        return jnp.matmul(hidden, self.output_matrix(), preferred_element_type=jnp.float32)

    def output_matrix(self) -> Float[Array, "D V"]:
        """The matrix from features to scores, in `config.dtype`."""
        kernel = self.embed.embedding[...].T if self.output is None else self.output.kernel[...]
        return kernel.astype(self.config.dtype)

    def init_cache(self, batch_size: int) -> Cache:
        """The cache of `batch_size` rows that have seen nothing.

        Its size does not depend on how many tokens will follow: per row and block, C key and value
        vectors in `config.dtype`, and float32 norm moments and complex64 CEMA states.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        slots = (config.num_layers, batch_size, config.chunk_size, config.num_heads)
        graphdef, layers = nnx.split(self.layers)

        def fresh_norm(layer: nnx.State):
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
                jax.vmap(fresh_norm)(layers),
                jnp.zeros(states, jnp.complex64),
            ),
            final_norm=self.final_norm.init_state(batch_size),
        )

    def reset_rows(self, cache: Cache, rows: Bool[Array, " B"]) -> Cache:
        """The cache with some rows made to forget everything, ready for a new document."""
        return cache.replace_rows(rows, self.init_cache(cache.position.shape[0]))

    def _start_new_documents(self, cache: Cache, segment_ids: Int32[Array, "B L"]) -> Cache:
        first = jnp.take_along_axis(segment_ids, jnp.argmax(segment_ids != 0, axis=1)[:, None], 1)
        first = first[:, 0]
        return self.reset_rows(cache, (first != 0) & (first != cache.segment))

    def _run_layers(
        self,
        x: Float[Array, "B L D"],
        places: PositionInfo,
        cache: Cache | None,
        key: PRNGKey | None,
    ) -> tuple[Float[Array, "B L D"], LayerCache | None]:
        graphdef, layers = nnx.split(self.layers)
        keys = None if key is None else jax.random.split(key, self.config.num_layers)

        def run_layer(x, layer):
            state, layer_cache, layer_key = layer
            block = nnx.merge(graphdef, state)
            out, layer_cache = block(x, places, cache=layer_cache, dropout_key=layer_key)
            return constrain(out, "batch", "length", "channels"), layer_cache

        saved = SAVED_NAMES[self.config.remat]
        if not self.config.scan_layers and self.config.remat == "none" and axis_size("data") == 1:
            # Rounded once a step. A loop would copy them instead, and FSDP keep them gathered.
            saved = (*saved, WEIGHT)
        run_layer = jax.checkpoint(
            run_layer,
            policy=jax.checkpoint_policies.save_only_these_names(*saved),
            prevent_cse=not self.config.scan_layers,
        )
        stacked = (layers, None if cache is None else cache.layers, keys)
        if self.config.scan_layers:
            return jax.lax.scan(run_layer, x, stacked)
        caches = []
        layers = _unstack(stacked, self.config.num_layers)
        for number, layer in enumerate(layers, start=1):
            if has_multiple_devices() and number < len(layers):
                x, following = _serialize_grad_reduction(x, layers[number][0])
                layers[number] = (following, *layers[number][1:])
            x, layer_cache = run_layer(x, layer)
            caches.append(layer_cache)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)


def check_tokens(tokens: Array | np.ndarray, vocab_size: int) -> None:
    """Raises ValueError for token ids outside [0, vocab_size); only numpy arrays are looked at."""
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens have shape {tokens.shape}; need (batch, length), length at least 1"
        )
    if isinstance(tokens, np.ndarray) and tokens.size:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token ids run from {low} to {high}, but the model knows 0 to {vocab_size - 1}; "
                "use the tokenizer the model was trained with"
            )


def _stacked_blocks(config: ModelConfig, rngs: nnx.Rngs) -> Block:
    rescale_starts = 0.1 * 0.5 ** jnp.arange(config.num_layers, dtype=jnp.float32)
    make = nnx.vmap(
        lambda key, start: Block(config, start, rngs=nnx.Rngs(key)),
        in_axes=(0, 0),
        transform_metadata={nnx.PARTITION_NAME: "layers"},
    )
    return make(jax.random.split(rngs.params(), config.num_layers), rescale_starts)


def _unstack(stacked: Any, count: int) -> list[Any]:
    """The layers' parts of arrays with a leading axis of layers."""
    leaves, structure = jax.tree.flatten(stacked)
    # The gradient of a split is one concatenation; that of an index is an array of zeros.
    pieces = [jax.lax.split(leaf, [1] * count) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [piece.squeeze(0) for piece in layer])
        for layer in zip(*pieces, strict=True)
    ]


@jax.custom_vjp
def _serialize_grad_reduction(x: Array, following: Any) -> tuple[Array, Any]:
    """A block's input and the next block's parameters, unchanged.

    Backward, no device goes on to the block before until the next block's gradients are reduced
    over devices: so they are while this block goes backward, and not all of them in the end.
    """
    return x, following


_serialize_grad_reduction.defvjp(
    lambda x, following: ((x, following), None),
    lambda _, gradients: jax.lax.optimization_barrier(gradients),
)


def _document_positions(
    shape: tuple[int, ...], segment_ids: Int32[Array, "B L"] | None, cache: Cache | None
) -> Int32[Array, "B L"] | None:
    """Position of every token in its document; None where that is the column index in every row."""
    if segment_ids is None:
        if cache is None:
            return None
        return cache.position[:, None] + jnp.arange(shape[1], dtype=jnp.int32)

    def find(segment_ids: Array, carried: Array) -> Array:
        columns = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
        border = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        start = jax.lax.cummax(jnp.where(border, columns, 0), axis=1)
        if (axis := sequence_axis()) is not None:
            carried = context_parallel.tokens_before_shard(segment_ids, axis)
        return columns - start + jnp.where(start == 0, carried[:, None], 0)

    tokens = partition_spec("batch", "length")
    carried = jnp.zeros(shape[0], jnp.int32) if cache is None else cache.position
    return shard_map_logical(find, inputs=(tokens, partition_spec("batch")), outputs=tokens)(
        segment_ids, carried
    )


def _after_last_token(
    cache: Cache, positions: Int32[Array, "B L"], segment_ids: Int32[Array, "B L"] | None
) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
    """Each row's position and segment id after its last token that is not padding."""
    if segment_ids is None:
        return positions[:, -1] + 1, jnp.maximum(cache.segment, 1)
    columns = jnp.arange(segment_ids.shape[1])
    last = jnp.max(jnp.where(segment_ids != 0, columns, -1), axis=1)
    at_last = partial(jnp.take_along_axis, indices=jnp.maximum(last, 0)[:, None], axis=1)
    position = jnp.where(last >= 0, at_last(positions)[:, 0] + 1, cache.position)
    segment = jnp.where(last >= 0, at_last(segment_ids)[:, 0], cache.segment)
    return position, segment
