"""Several successive tokens of every row through the model at once, for speculation.

The states change only after it is known how many of the tokens are accepted.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
from jax import numpy as jnp

from megalodon_jax.cache import Cache, LayerCache, slot_specs
from megalodon_jax.config import ModelConfig
from megalodon_jax.inference.rows import set_rows
from megalodon_jax.inference.sharded_operations import average_steps, normalize_and_average
from megalodon_jax.inference.step import forward, rotation_of, step_norm
from megalodon_jax.inference.weights import DecodeWeights, NormVectors
from megalodon_jax.parallel.sharding import partition_spec, shard_map_logical
from megalodon_jax.typing import Array, Float, Float32, Int32, Shaped
from pallas_kernels.chunk_attention import Int8Slots, KeyValueCache
from pallas_kernels.chunk_attention.types import accumulation_dtype, matmul_precision
from pallas_kernels.chunk_decode import RotaryFactors, SharedRepresentation
from pallas_kernels.norm_state_step import norm_state_steps
from pallas_kernels.norm_state_step.xla import moments_after, norm_steps
from pallas_kernels.state_step import CemaStepTables
from pallas_kernels.timestep_norm import TimestepNormState


class PendingLayer(NamedTuple):
    """Arrays of a layer for `commit`.

    Attributes:
      norm: TimestepNorm's moments after each token, in a layer without CEMA.
      inputs: of TimestepNorm and CEMA, or of CEMA where another norm comes before it, in the
        model's dtype: D numbers a token, where CEMA's state has 2 N D.
    """

    norm: TimestepNormState | None
    inputs: Float[Array, "B T D"] | None

    @classmethod
    def of(cls, layer: LayerCache) -> "PendingLayer":
        """A layer's states after several tokens, of `_SeveralTokens`."""
        return cls(layer.norm, layer.cema)


class Pending(NamedTuple):
    """The states that T tokens lead to, not in the cache yet."""

    layers: tuple[PendingLayer, ...]
    final_norm: TimestepNormState | None


class PositionsOutput(NamedTuple):
    """Result of `decode_positions`.

    Attributes:
      logits: scores of the token after each of the T tokens.
      cache: the cache with keys and values of the T tokens in slots that are not filled yet.
      pending: for `commit`.
    """

    logits: Float32[Array, "B T V"]
    cache: Cache
    pending: Pending


def decode_positions(
    weights: DecodeWeights, cache: Cache, tokens: Int32[Array, "B T"]
) -> PositionsOutput:
    """Feeds T successive tokens to each of the first B rows, without a change of their states.

    Scores equal those of T calls of `step.decode` up to rounding: the products have B T rows. The
    matrices are read once for all tokens, which is the use of it where few rows are decoded.
    Attention reads all slots of the chunk; where S > B, its products read a copy of the B rows.
    Donation as in `step.decode`.

    Args:
      weights: from `prepare`.
      cache: S >= B rows. The values (or their scales) of slots that no token of the chunk fills
        must be finite, as those of `Megalodon.init_cache` and of former chunks are.
      tokens: token ids. Tokens at or after a row's next chunk border have scores without meaning,
        and none of their keys and values is written.
    """
    config = weights.config
    B, T = tokens.shape
    position = cache.position[:B, None] + jnp.arange(T, dtype=jnp.int32)
    norm = cache.layers[0].norm
    count = None if norm is None else norm.count
    rows = _SeveralTokens(config, position, rotation_of(config, position.reshape(-1)), count)
    logits, layers, final_norm = forward(weights, cache, tokens.reshape(-1), rows)
    written = tuple(
        old._replace(keys_and_values=new.keys_and_values)
        for old, new in zip(cache.layers, layers, strict=True)
    )
    # The other layers have no attention: their states stay as they are.
    num_complete = config.num_layers - config.skip_attention
    return PositionsOutput(
        logits.reshape(B, T, -1),
        dataclasses.replace(cache, layers=written),
        Pending(tuple(map(PendingLayer.of, layers[:num_complete])), final_norm),
    )


def commit(
    weights: DecodeWeights, cache: Cache, pending: Pending, accepted: Int32[Array, " B"]
) -> Cache:
    """The cache after the first `accepted` tokens of each row of `decode_positions`.

    Args:
      weights: as there.
      cache: its result.
      pending: its result.
      accepted: 0 to T; a row with 0 stays. At most the tokens up to the row's chunk border.
    """
    B = accepted.shape[0]
    layers = []
    # Layers without attention (`skip_attention`) have nothing pending.
    for layer, old, new in zip(weights.layers, cache.layers, pending.layers, strict=False):
        norm, cema = old.norm, old.cema
        if layer.average is None:
            norm = _select(accepted, norm, new.norm)
        else:
            assert cema is not None
            assert new.inputs is not None
            if norm is None:
                _, state = average_steps(new.inputs, layer.average, cema[:B], accepted)
                cema = set_rows(cema, state)
            else:
                assert cache.layers[0].norm is not None
                _, _, norm, cema = normalize_and_average(
                    norm_state_steps,
                    new.inputs,
                    step_norm(weights.config, layer.norm),
                    norm,
                    layer.average,
                    cema,
                    accepted,
                    cache.layers[0].norm.count,
                )
        layers.append(LayerCache(old.keys_and_values, norm, cema))
    segment = jnp.maximum(cache.segment[:B], (accepted > 0).astype(jnp.int32))
    return Cache(
        set_rows(cache.position, cache.position[:B] + accepted),
        set_rows(cache.segment, segment),
        (*layers, *cache.layers[len(layers) :]),
        _select(accepted, cache.final_norm, pending.final_norm),
    )


def _select(
    accepted: Int32[Array, " B"],
    state: TimestepNormState | None,
    after: TimestepNormState | None,
) -> TimestepNormState | None:
    """The state after the accepted ones of the tokens, from those after each."""
    if state is None or after is None:
        return None
    return jax.tree.map(set_rows, state, moments_after(accepted, state, after))


class _SeveralTokens(NamedTuple):
    """T tokens of each row, R = B T; implements `step.RowOperations`.

    Attributes:
      config: of the model.
      position: of the tokens.
      rotation: see `RowOperations`.
      count: tokens that TimestepNorm has had, the same in every layer; None without TimestepNorm.
    """

    config: ModelConfig
    position: Int32[Array, "B T"]
    rotation: RotaryFactors | None
    count: Int32[Array, " S"] | None

    def normalize(
        self, vectors: NormVectors, x: Float[Array, "R D"], state: TimestepNormState
    ) -> tuple[Float[Array, "R D"], TimestepNormState]:
        y, states = norm_steps(self._by_row(x), step_norm(self.config, vectors), state)
        return y.reshape(x.shape), states

    def average(
        self, u: Float[Array, "R D"], tables: CemaStepTables, state: Float32[Array, "S 2N D"]
    ) -> tuple[Float[Array, "R D"], Float[Array, "B T D"]]:
        inputs = self._by_row(u)
        y, _ = average_steps(inputs, tables, state[: len(self.position)])
        return y.reshape(u.shape), inputs

    def normalize_and_average(
        self,
        vectors: NormVectors,
        x: Float[Array, "R D"],
        norm: TimestepNormState,
        tables: CemaStepTables,
        cema: Float32[Array, "S 2N D"],
    ) -> tuple[Float[Array, "R D"], Float[Array, "R D"], None, Float[Array, "B T D"]]:
        assert self.count is not None
        inputs = self._by_row(x)
        # The states stay: they change when the number of accepted tokens is known.
        outputs_alone = partial(norm_state_steps, counts=0)
        out = normalize_and_average(
            outputs_alone,
            inputs,
            step_norm(self.config, vectors),
            norm,
            tables,
            cema,
            None,
            self.count,
        )
        return out.u.reshape(x.shape), out.y.reshape(x.shape), None, inputs

    def attend(
        self,
        shared: SharedRepresentation,
        value: Float[Array, "R H Dv"],
        gate: Float[Array, "R H Dv"],
        cache: KeyValueCache,
    ) -> tuple[Float[Array, "R H Dv"], KeyValueCache]:
        query, key = shared.queries_and_keys(value.dtype)
        heads = partition_spec("batch", None, "heads", None)
        specs = slot_specs(cache)
        out, cache = shard_map_logical(
            _attend,
            in_specs=(heads, heads, heads, heads, specs, partition_spec("batch", None)),
            out_specs=(heads, specs),
        )(*map(self._by_row, (query, key, value, gate)), cache, self.position)
        return out.reshape(value.shape), cache

    def _by_row(self, x: Float[Array, "R *d"]) -> Float[Array, "B T *d"]:
        return x.reshape(*self.position.shape, *x.shape[1:])


def _attend(
    query: Float[Array, "B T H Dk"],
    key: Float[Array, "B T H Dk"],
    value: Float[Array, "B T H Dv"],
    gate: Float[Array, "B T H Dv"],
    cache: KeyValueCache,
    position: Int32[Array, "B T"],
) -> tuple[Float[Array, "B T H Dv"], KeyValueCache]:
    """`chunk_decode` of T queries: each sees the filled slots, and the tokens up to its own."""
    B, T = position.shape
    num_slots = cache.key.shape[2]
    # Slots beyond the border are out of bounds: they are not written.
    slots = position[:, :1] % num_slots + jnp.arange(T, dtype=jnp.int32)
    cache = jax.tree.map(partial(_write, index=slots), cache, cache.encode(key, value))
    keys, values = jax.tree.map(lambda leaf: leaf[:B], cache)
    is_seen = jnp.arange(num_slots) <= slots[..., None]
    wide, precision = accumulation_dtype(query.dtype), matmul_precision(query.dtype)
    key_scale = value_scale = None
    if isinstance(keys, Int8Slots) and isinstance(values, Int8Slots):
        # Scales of keys multiply the scores, those of values the weights: no slot is multiplied.
        key_scale, value_scale = keys.scale[:, :, None], values.scale[:, :, None]
        keys, values = keys.values.astype(query.dtype), values.values.astype(value.dtype)
    scores = jnp.einsum(
        "bthd,bhcd->bhtc", query, keys, precision=precision, preferred_element_type=wide
    )
    scores = scores if key_scale is None else scores * key_scale
    weights = jax.nn.softmax(jnp.where(is_seen[:, None], scores, -jnp.inf), axis=-1)
    weights = weights if value_scale is None else weights * value_scale
    # A mask of the values, for slots that hold NaN, would be a copy of them: 0.8 GB a step of
    # mega200M with 8 rows (compiled for an H100), twice the weights.
    out = jnp.einsum(
        "bhtc,bhcd->bthd",
        weights.astype(value.dtype),
        values,
        precision=precision,
        preferred_element_type=wide,
    )
    out = out * jax.nn.silu(gate.astype(out.dtype))
    return out.astype(value.dtype), cache


def _write(
    slots: Shaped[Array, "S H C *D"], new: Shaped[Array, "B T H *D"], index: Int32[Array, "B T"]
) -> Shaped[Array, "S H C *D"]:
    rows = jnp.arange(len(new), dtype=jnp.int32)[:, None]
    return slots.at[rows, :, index].set(
        new, mode="drop", unique_indices=True, indices_are_sorted=True
    )
