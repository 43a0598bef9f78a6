"""One token of every row through the model: the decoding step."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax import numpy as jnp

from megalodon_jax.cache import Cache, LayerCache
from megalodon_jax.config import ModelConfig
from megalodon_jax.inference.weights import (
    DecodeLayer,
    DecodeWeights,
    Int8Matrix,
    NormVectors,
    Projection,
)
from megalodon_jax.modules.norms import rms_normalize
from megalodon_jax.modules.rotary import rotation
from megalodon_jax.parallel.sharding import constrain, partition_spec, shard_map_logical
from megalodon_jax.typing import Array, Bool, Float, Float32, Int32
from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_decode import ChunkDecodeOutput, chunk_decode
from pallas_kernels.state_step import CemaStepTables, StateStepOutput, state_step
from pallas_kernels.timestep_norm import TimestepNormState, timestep_norm_step


class DecodeOutput(NamedTuple):
    """Scores of the next token of every row, and the cache after the step."""

    logits: Float32[Array, "B V"]
    cache: Cache


def decode(
    weights: DecodeWeights,
    cache: Cache,
    tokens: Int32[Array, " B"],
    active: Bool[Array, " B"] | None = None,
) -> DecodeOutput:
    """Feeds one token to each of the first B rows of a cache; the same as calling the model.

    Under `jax.jit` with a donated cache, and in the carry of `jax.lax.scan`, the cache is updated
    in place. Products have the weights' dtype and float32 sums; states and softmax are float32.

    Args:
      weights: from `prepare`.
      cache: S >= B rows; the rows from B on are neither read nor changed.
      tokens: token ids.
      active: rows whose state changes; the others' scores have no meaning, and only slots that hold
        no token of their chunk are written. None: all rows.
    """
    config = weights.config
    B = tokens.shape[0]
    active = jnp.ones(B, bool) if active is None else active
    position = cache.position[:B]
    rows = _OneToken(config, position, active, rotation_of(config, position))
    logits, layers, final_norm = forward(weights, cache, tokens, rows)
    segment = jnp.maximum(cache.segment[:B], active.astype(jnp.int32))
    next_cache = Cache(
        set_rows(cache.position, position + active),
        set_rows(cache.segment, segment),
        layers,
        final_norm,
    )
    return DecodeOutput(logits, next_cache)


class Forwarded(NamedTuple):
    """Scores after R tokens, and what `RowOperations` made of the layers' states."""

    logits: Float32[Array, "R V"]
    layers: tuple[LayerCache, ...]
    final_norm: Any


def forward(
    weights: DecodeWeights, cache: Cache, tokens: Int32[Array, " R"], rows: "RowOperations"
) -> Forwarded:
    """R tokens through the model: products over all of them, states as `rows` defines."""
    config = weights.config
    x = jnp.take(weights.embedding, tokens, axis=0)
    if config.scale_emb:
        x = x * jnp.asarray(math.sqrt(config.model_dim), x.dtype)
    layers = []
    for layer, layer_cache in zip(weights.layers, cache.layers, strict=True):
        x, layer_cache = _block(config, layer, layer_cache, constrain(x, "batch", "channels"), rows)
        layers.append(layer_cache)
    hidden, final_norm = _time_norm(config, weights.final_norm, x, cache.final_norm, rows)
    logits = constrain(multiply(hidden, weights.output), "batch", "vocab")
    return Forwarded(logits, tuple(layers), final_norm)


def multiply(x: Float[Array, "B in"], projection: Projection) -> Float32[Array, "B out"]:
    """x W + b in float32; the operands of the product have the dtype of x."""
    kernel, bias = projection
    if isinstance(kernel, Int8Matrix):
        # Integers up to 127 are exact in bfloat16; the scale of a column leaves the sum.
        product = jnp.matmul(x, kernel.values.astype(x.dtype), preferred_element_type=jnp.float32)
        product = product * kernel.scale
    else:
        product = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
    return product if bias is None else product + bias


class RotaryFactors(NamedTuple):
    """Factors of a feature and of the other one in its pair: one pass, without a transposition."""

    own: Float32[Array, "R 1 Dk"]
    other: Float32[Array, "R 1 Dk"]


class RowOperations(Protocol):
    """The operations that read or change states, for R tokens: one or several of each row."""

    @property
    def rotation(self) -> RotaryFactors | None:
        """Rotary factors of the tokens; None without rotary embedding."""
        ...

    def normalize(
        self, vectors: NormVectors, x: Float[Array, "R D"], state: TimestepNormState
    ) -> tuple[Float[Array, "R D"], Any]:
        """TimestepNorm."""
        ...

    def average(
        self, u: Float[Array, "R D"], tables: CemaStepTables, state: Float32[Array, "S 2N D"]
    ) -> tuple[Float[Array, "R D"], Any]:
        """CEMA or EMA."""
        ...

    def attend(
        self,
        query: Float[Array, "R H Dk"],
        key: Float[Array, "R H Dk"],
        value: Float[Array, "R H Dv"],
        gate: Float[Array, "R H Dv"],
        cache: KeyValueCache,
    ) -> tuple[Float[Array, "R H Dv"], KeyValueCache]:
        """Attention inside the chunk; its outputs are multiplied by silu(gate)."""
        ...


class _OneToken(NamedTuple):
    """One token of each row; states change where the row is active."""

    config: ModelConfig
    position: Int32[Array, " B"]
    active: Bool[Array, " B"]
    rotation: RotaryFactors | None

    def normalize(
        self, vectors: NormVectors, x: Float[Array, "B D"], state: TimestepNormState
    ) -> tuple[Float[Array, "B D"], TimestepNormState]:
        config, B = self.config, x.shape[0]
        old = TimestepNormState(*(field[:B] for field in state))
        y, new = timestep_norm_step(
            x, *vectors, num_groups=config.norm_num_groups, eps=config.norm_eps, state=old
        )
        new = jax.tree.map(lambda new, old: _select(self.active, new, old), new, old)
        return y, TimestepNormState(*map(set_rows, state, new))

    def average(
        self, u: Float[Array, "B D"], tables: CemaStepTables, state: Float32[Array, "S 2N D"]
    ) -> StateStepOutput:
        return _average(u, tables, state, self.active)

    def attend(
        self,
        query: Float[Array, "B H Dk"],
        key: Float[Array, "B H Dk"],
        value: Float[Array, "B H Dv"],
        gate: Float[Array, "B H Dv"],
        cache: KeyValueCache,
    ) -> ChunkDecodeOutput:
        return _attend(query, key, value, gate, cache, self.position)


def rotation_of(config: ModelConfig, position: Int32[Array, " R"]) -> RotaryFactors | None:
    """As `modules.rotary.rotate`: (even cos - odd sin, even sin + odd cos) for every pair."""
    if config.rope_base is None:
        return None
    cos, sin = rotation(position[:, None] % config.chunk_size, config.head_dim, config.rope_base)
    return RotaryFactors(
        jnp.stack([cos, cos], axis=-1).reshape(len(position), 1, -1),
        jnp.stack([-sin, sin], axis=-1).reshape(len(position), 1, -1),
    )


def _block(
    config: ModelConfig,
    layer: DecodeLayer,
    cache: LayerCache,
    x: Float[Array, "R D"],
    rows: RowOperations,
) -> tuple[Float[Array, "R D"], LayerCache]:
    u, norm = _time_norm(config, layer.norm, x, cache.norm, rows)
    averaged, cema = u, None
    if layer.average is not None:
        assert cache.cema is not None
        averaged, cema = rows.average(u, layer.average, cache.cema)
    m = _scaled(rms_normalize(averaged, config.norm_eps), layer.rms_scale).astype(x.dtype)
    z, gate, linear = _split(m, layer.mixed, config.z_dim, config.value_dim)
    value = jax.nn.silu(multiply(u, layer.values)).astype(x.dtype)
    query, key = _queries_and_keys(config, layer, z, rows.rotation)
    by_head = (x.shape[0], config.num_heads, -1)
    gated, keys_and_values = rows.attend(
        query.astype(x.dtype),
        key.astype(x.dtype),
        value.reshape(by_head),
        gate.astype(x.dtype).reshape(by_head),
        cache.keys_and_values,
    )
    attended = linear + multiply(gated.reshape(value.shape), layer.attention_output)
    hidden = _feed_forward(config, layer, x + attended, x.dtype)
    # The second residual skips both sub-layers ("two_hop"), see `modules.block.Block`.
    out = x + hidden
    if config.residual_connection == "pre_norm":
        out = out + attended
    return out.astype(x.dtype), LayerCache(keys_and_values, norm, cema)


def _time_norm(
    config: ModelConfig,
    vectors: NormVectors,
    x: Float[Array, "R D"],
    state: TimestepNormState | None,
    rows: RowOperations,
) -> tuple[Float[Array, "R D"], Any]:
    if state is None:
        scale, bias = vectors
        normed = (
            rms_normalize(x, config.norm_eps)
            if config.time_norm == "rms"
            else _layer_normalize(x, config.norm_eps)
        )
        return _offset(_scaled(normed, scale), bias).astype(x.dtype), None
    return rows.normalize(vectors, x, state)


def _average(
    u: Float[Array, "B D"],
    tables: CemaStepTables,
    state: Float32[Array, "S 2N D"],
    active: Bool[Array, " B"],
) -> StateStepOutput:
    channels, states = (
        partition_spec("batch", "channels"),
        partition_spec("batch", None, "channels"),
    )
    table = partition_spec(None, "channels")
    return shard_map_logical(
        state_step,
        in_specs=(
            channels,
            CemaStepTables(table, table, table, table, table, partition_spec("channels")),
            states,
            partition_spec("batch"),
        ),
        out_specs=StateStepOutput(channels, states),
    )(u, tables, state, active)


def _queries_and_keys(
    config: ModelConfig, layer: DecodeLayer, z: Float32[Array, "B Z"], by: RotaryFactors | None
) -> list[Float32[Array, "B H Dk"]]:
    heads = (config.num_heads, config.head_dim)
    z = z.reshape(-1, *heads)
    z = rms_normalize(z, config.norm_eps) if config.qk_norm else jax.nn.silu(z)

    def transform(scale: Array, offset: Array) -> Array:
        projected = z * scale.reshape(heads) + offset.reshape(heads)
        if by is None:
            return projected
        pairs = projected.reshape(*projected.shape[:-1], -1, 2)
        return projected * by.own + pairs[..., ::-1].reshape(projected.shape) * by.other

    return list(map(transform, layer.query_key_scale, layer.query_key_offset))


def _attend(
    query: Float[Array, "B H Dk"],
    key: Float[Array, "B H Dk"],
    value: Float[Array, "B H Dv"],
    gate: Float[Array, "B H Dv"],
    cache: KeyValueCache,
    position: Int32[Array, " B"],
) -> ChunkDecodeOutput:
    def attend(query, key, value, gate, cache, position) -> ChunkDecodeOutput:
        return chunk_decode(query, key, value, cache, position, gate=gate)

    heads, slots = (
        partition_spec("batch", "heads", None),
        partition_spec("batch", "heads", None, None),
    )
    cache_spec = KeyValueCache(slots, slots)
    return shard_map_logical(
        attend,
        in_specs=(heads, heads, heads, heads, cache_spec, partition_spec("batch")),
        out_specs=ChunkDecodeOutput(heads, cache_spec),
    )(query, key, value, gate, cache, position)


def _feed_forward(
    config: ModelConfig, layer: DecodeLayer, y: Float32[Array, "B D"], dtype: Any
) -> Float32[Array, "B D"]:
    scale, bias = layer.ffn_norm
    normed = _offset(_scaled(_layer_normalize(y, config.norm_eps), scale), bias).astype(dtype)
    if config.swiglu:
        hidden, gate = _split(normed, layer.ffn_input, config.ffn_hidden_dim)
        hidden = jax.nn.silu(hidden) * gate
    else:
        hidden = jax.nn.silu(multiply(normed, layer.ffn_input[0]))
    out = multiply(hidden.astype(dtype), layer.ffn_output)
    return _scaled(out, layer.ffn_scale)


def _split(
    x: Float[Array, "B D"], projections: Sequence[Projection], *widths: int
) -> list[Float32[Array, "B _"]]:
    """Products with one projection of several layers, or with one for each."""
    if len(projections) > 1:
        return [multiply(x, projection) for projection in projections]
    borders = [sum(widths[: i + 1]) for i in range(len(widths))]
    return jnp.split(multiply(x, projections[0]), borders, axis=1)


def _layer_normalize(x: Float[Array, "B D"], eps: float) -> Float32[Array, "B D"]:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)


def _scaled(x: Array, scale: Array | None) -> Array:
    return x if scale is None else x * scale


def _offset(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias


def _select(rows: Bool[Array, " B"], new: Array, old: Array) -> Array:
    return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def set_rows(old: Array, new: Array) -> Array:
    """Writes the first rows in place."""
    return new if new.shape == old.shape else old.at[: new.shape[0]].set(new)
