"""The token embedding, with a table that may be sharded over the vocabulary."""

from typing import Self

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import AnyModelConfig
from megalodon_jax.modules.collective_matmul import channel_block, send, sum_terms
from megalodon_jax.modules.parameters import axis_names, embedding_initializer
from megalodon_jax.parallel.sharding import (
    axis_size,
    has_multiple_devices,
    partition_spec,
    shard_map_logical,
    weight_axes,
)
from megalodon_jax.typing import Array, Float, Int32


class Embedding(nnx.Embed):
    """A table (V, D) of token embeddings; `attend` gives scores with the same table."""

    @classmethod
    def from_config(cls, config: AnyModelConfig, *, rngs: nnx.Rngs) -> Self:
        """The embedding of a model."""
        return cls(
            config.vocab_size,
            config.model_dim,
            embedding_init=embedding_initializer(config.model_dim),
            rngs=rngs,
            embedding_metadata=axis_names("vocab", "embed"),
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
        )

    def __call__(self, inputs: Int32[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embeddings of token ids in `dtype`; NaN for an id outside the table."""
        look_up = self._look_up_channels if axis_size("model") > 1 else self._look_up
        x = shard_map_logical(
            look_up,
            in_specs=(partition_spec("vocab", "embed"), partition_spec("batch", "length")),
            out_specs=partition_spec("batch", "length", "channels"),
        )(self.embedding[...], inputs)
        # Cast after the lookup, so that embedding gradients accumulate in float32.
        return x.astype(self.dtype)

    def _look_up(self, table: Array, tokens: Array) -> Array:
        if not has_multiple_devices():
            return jnp.take(table, tokens, axis=0)
        if axes := weight_axes():
            table = jax.lax.all_gather(table, axes, axis=1, tiled=True)
        local = tokens - jax.lax.axis_index("model") * table.shape[0]
        is_local = (local >= 0) & (local < table.shape[0])
        x = jnp.take(table, jnp.where(is_local, local, 0), axis=0)
        x = jnp.where(is_local[..., None], x, 0)
        is_known = (tokens >= 0) & (tokens < self.num_embeddings)
        return jnp.where(is_known[..., None], x, jnp.nan)

    def _look_up_channels(self, table: Array, tokens: Array) -> Array:
        """The lookup in a table that is sharded over the vocabulary, for this device's channels.

        Each device looks up the ids it has for the channels of every device, and sends them.
        """
        if axes := weight_axes():
            table = jax.lax.all_gather(table, axes, axis=1, tiled=True)
        local = tokens - jax.lax.axis_index("model") * table.shape[0]
        is_local = (local >= 0) & (local < table.shape[0])
        local = jnp.where(is_local, local, table.shape[0])

        def look_up(shift: int) -> Array:
            channels = channel_block(table, shift, axis=1)
            x = jnp.take(channels, local, axis=0, mode="fill", fill_value=0)
            # One term of the sum over devices is not zero: the cast before it changes nothing.
            return send(x.astype(self.dtype), shift)

        x = sum_terms(look_up(shift) for shift in range(axis_size("model")))
        is_known = (tokens >= 0) & (tokens < self.num_embeddings)
        return jnp.where(is_known[..., None], x, jnp.nan)


def check_tokens(tokens: Array | np.ndarray, vocab_size: int) -> None:
    """Raises ValueError for a wrong shape, or ids outside [0, vocab_size) in a numpy array."""
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


def check_embeddings(embeddings: Array, model_dim: int) -> None:
    """Raises ValueError unless the shape is (B, L, D) with L >= 1."""
    shape = embeddings.shape
    if len(shape) != 3 or shape[1] == 0 or shape[2] != model_dim:
        raise ValueError(
            f"inputs_embeds have shape {shape}; need (batch, length >= 1, {model_dim})"
        )
