"""One token of every row through the model: the decoding step."""

import math
from typing import Any, NamedTuple, Protocol

import jax
from jax import numpy as jnp

from megalodon_jax.cache import Cache, LayerCache
from megalodon_jax.config import ModelConfig
from megalodon_jax.inference.rows import set_rows
from megalodon_jax.inference.sharded_operations import attend, average, normalize_and_average
from megalodon_jax.inference.weights import (
    DecodeLayer,
    DecodeWeights,
    NormVectors,
    Projection,
)
from megalodon_jax.modules.norms import rms_normalize
from megalodon_jax.modules.rotary import rotation
from megalodon_jax.parallel.sharding import constrain
from megalodon_jax.typing import Array, Bool, Float, Float32, Int32
from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_decode import (
    ChunkDecodeOutput,
    RotaryFactors,
    SharedRepresentation,
)
from pallas_kernels.norm_state_step import NormStateStepOutput, StepNorm, norm_state_step
from pallas_kernels.norm_state_step.xla import norm_step
from pallas_kernels.skinny_matmul import Epilogue, Part, RowNorm, skinny_matmul
from pallas_kernels.skinny_matmul.xla import normalize
from pallas_kernels.state_step import CemaStepTables, StateStepOutput
from pallas_kernels.timestep_norm import TimestepNormState


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
    norm = cache.layers[0].norm
    count = None if norm is None else norm.count
    rows = _OneToken(config, position, active, rotation_of(config, position), count)
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
    """Scores after R tokens, and what `RowOperations` made of the layers' states.

    The states of layers without attention (`skip_attention`) are those that came in.
    """

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
    num_complete = config.num_layers - config.skip_attention
    for number, (layer, layer_cache) in enumerate(zip(weights.layers, cache.layers, strict=True)):
        x = constrain(x, "batch", "channels")
        if number < num_complete:
            x, layer_cache = _block(config, layer, layer_cache, x, rows)
        else:
            x = _feed_forward(config, layer, x.astype(jnp.float32), x, x.dtype)
        layers.append(layer_cache)
    hidden, final_norm = _time_norm(config, weights.final_norm, x, cache.final_norm, rows)
    logits = constrain(
        _product(config, hidden, weights.output, config.num_outputs, jnp.float32), "batch", "vocab"
    )
    return Forwarded(logits, tuple(layers), final_norm)


class RowOperations(Protocol):
    """The operations that read or change states, for R tokens: one or several of each row.

    States are those of the cache that `forward` gets.
    """

    @property
    def rotation(self) -> RotaryFactors | None:
        """Rotary factors of the tokens; None without rotary embedding."""
        ...

    def normalize(
        self, vectors: NormVectors, x: Float[Array, "R D"], state: Any
    ) -> tuple[Float[Array, "R D"], Any]:
        """TimestepNorm."""
        ...

    def average(
        self, u: Float[Array, "R D"], tables: CemaStepTables, state: Any
    ) -> tuple[Float[Array, "R D"], Any]:
        """CEMA or EMA."""
        ...

    def normalize_and_average(
        self,
        vectors: NormVectors,
        x: Float[Array, "R D"],
        norm: Any,
        tables: CemaStepTables,
        cema: Any,
    ) -> tuple[Float[Array, "R D"], Float[Array, "R D"], Any, Any]:
        """TimestepNorm, and CEMA or EMA of its result."""
        ...

    def attend(
        self,
        shared: SharedRepresentation,
        value: Float[Array, "R H Dv"],
        gate: Float[Array, "R H Dv"],
        cache: KeyValueCache,
    ) -> tuple[Float[Array, "R H Dv"], KeyValueCache]:
        """Attention inside the chunk; its outputs are multiplied by silu(gate)."""
        ...


class _OneToken(NamedTuple):
    """One token of each row; states change where the row is active.

    Attributes:
      config: of the model.
      position: of the tokens.
      active: rows that change.
      rotation: see `RowOperations`.
      count: tokens that TimestepNorm has had, the same in every layer; None without TimestepNorm.
    """

    config: ModelConfig
    position: Int32[Array, " B"]
    active: Bool[Array, " B"]
    rotation: RotaryFactors | None
    count: Int32[Array, " S"] | None

    def normalize(
        self, vectors: NormVectors, x: Float[Array, "B D"], state: TimestepNormState
    ) -> tuple[Float[Array, "B D"], TimestepNormState]:
        return norm_step(x, step_norm(self.config, vectors), state, self.active)

    def average(
        self, u: Float[Array, "B D"], tables: CemaStepTables, state: Float32[Array, "S 2N D"]
    ) -> StateStepOutput:
        return average(u, tables, state, self.active)

    def normalize_and_average(
        self,
        vectors: NormVectors,
        x: Float[Array, "B D"],
        norm: TimestepNormState,
        tables: CemaStepTables,
        cema: Float32[Array, "S 2N D"],
    ) -> NormStateStepOutput:
        assert self.count is not None
        parameters = step_norm(self.config, vectors)
        return normalize_and_average(
            norm_state_step, x, parameters, norm, tables, cema, self.active, self.count
        )

    def attend(
        self,
        shared: SharedRepresentation,
        value: Float[Array, "B H Dv"],
        gate: Float[Array, "B H Dv"],
        cache: KeyValueCache,
    ) -> ChunkDecodeOutput:
        return attend(shared, value, gate, cache, self.position)


def step_norm(config: ModelConfig, vectors: NormVectors) -> StepNorm:
    """TimestepNorm's parameters."""
    return StepNorm(*vectors, config.norm_num_groups, config.norm_eps)


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
    u, averaged, norm, cema = _normalize_and_average_if_any(config, layer, x, cache, rows)
    dtype = x.dtype
    value = _product(config, u, layer.values, config.value_dim, dtype, activation="silu")
    shared, gate, linear = _mixed(config, layer, averaged, rows.rotation, dtype)
    by_head = (x.shape[0], config.num_heads, -1)
    gated, keys_and_values = rows.attend(
        shared,
        value.reshape(by_head),
        gate.reshape(by_head),
        cache.keys_and_values,
    )
    # x and the output of attention: the input of the feed-forward network.
    y = _product(
        config,
        gated.reshape(value.shape),
        layer.attention_output,
        config.model_dim,
        jnp.float32,
        added=(linear, x),
    )
    # The second residual skips both sub-layers ("two_hop"), see `modules.block.Block`.
    residual = y if config.residual_connection == "pre_norm" else x
    out = _feed_forward(config, layer, y, residual, dtype)
    return out, LayerCache(keys_and_values, norm, cema)


def _product(
    config: ModelConfig,
    x: Float[Array, "R K"],
    projection: Projection,
    width: int,
    dtype: Any,
    *,
    norm: RowNorm | None = None,
    **epilogue: Any,
) -> Float[Array, "R N"]:
    """norm(x) Wᵀ + b, and what `Epilogue` adds, as one array."""
    kernel, bias, weight_sums = projection
    (y,) = skinny_matmul(
        x,
        kernel,
        parts=[Part(width, dtype)],
        norm=norm,
        epilogue=Epilogue(bias, **epilogue),
        dtype=jnp.dtype(config.dtype),
        weight_sums=weight_sums,
    )
    return y


def _normalize_and_average_if_any(
    config: ModelConfig,
    layer: DecodeLayer,
    x: Float[Array, "R D"],
    cache: LayerCache,
    rows: RowOperations,
) -> tuple[Float[Array, "R D"], Float[Array, "R D"], Any, Any]:
    """TimestepNorm or another norm, then CEMA, EMA or nothing."""
    if cache.norm is not None and layer.average is not None and cache.cema is not None:
        return rows.normalize_and_average(layer.norm, x, cache.norm, layer.average, cache.cema)
    u, norm = _time_norm(config, layer.norm, x, cache.norm, rows)
    averaged, cema = u, None
    if layer.average is not None:
        assert cache.cema is not None
        averaged, cema = rows.average(u, layer.average, cache.cema)
    return u, averaged, norm, cema


def _mixed(
    config: ModelConfig,
    layer: DecodeLayer,
    averaged: Float[Array, "R D"],
    by: RotaryFactors | None,
    dtype: Any,
) -> tuple[SharedRepresentation, Array, Array]:
    """z of queries and keys, the gate and the linear path: products with normalized averages."""
    of_z = [Part(config.z_dim, jnp.float32)]
    if by is not None:
        of_z.append(Part(config.z_dim, jnp.float32, is_swapped=True))
    parts = [of_z, [Part(config.value_dim, dtype)], [Part(config.model_dim, jnp.float32)]]
    if len(layer.mixed) == 1:
        parts = [[*parts[0], *parts[1], *parts[2]]]
    results = []
    for projection, its_parts in zip(layer.mixed, parts, strict=True):
        results += skinny_matmul(
            averaged,
            projection.kernel,
            parts=its_parts,
            norm=RowNorm("rms", config.norm_eps),
            epilogue=Epilogue(projection.bias),
            dtype=dtype,
        )
    *z, gate, linear = results
    z = [each.reshape(-1, config.num_heads, config.head_dim) for each in z]
    shared = SharedRepresentation(
        z[0],
        layer.queries_and_keys,
        None if by is None else z[1],
        by,
        config.norm_eps if config.qk_norm else None,
    )
    return shared, gate, linear


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
            else normalize(x, RowNorm("layer", config.norm_eps))
        )
        return _offset(_scaled(normed, scale), bias).astype(x.dtype), None
    return rows.normalize(vectors, x, state)


def _feed_forward(
    config: ModelConfig,
    layer: DecodeLayer,
    y: Float32[Array, "B D"],
    residual: Float[Array, "B D"],
    dtype: Any,
) -> Float[Array, "B D"]:
    """The feed-forward network of y, and the residual."""

    def into(projection: Projection, activation: Any, dtype: Any) -> Array:
        norm = RowNorm("layer", config.norm_eps)
        width = config.ffn_hidden_dim
        return _product(config, y, projection, width, dtype, norm=norm, activation=activation)

    if len(layer.ffn_input) == 1:
        hidden = into(layer.ffn_input[0], "swiglu" if config.swiglu else "silu", dtype)
    else:
        hidden, gate = (into(each, None, jnp.float32) for each in layer.ffn_input)
        hidden = (jax.nn.silu(hidden) * gate).astype(dtype)
    return _product(
        config,
        hidden,
        layer.ffn_output,
        config.model_dim,
        dtype,
        scale=layer.ffn_scale,
        added=(residual,),
    )


def _scaled(x: Array, scale: Array | None) -> Array:
    return x if scale is None else x * scale


def _offset(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias
