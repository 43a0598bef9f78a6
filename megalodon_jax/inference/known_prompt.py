"""Prompts that are known up to their last tokens: one program from the prefix to the first token.

A prefill piece runs the operations of training, which are many small kernels for few tokens. Here
the last tokens go through the kernels of decoding, several at once, as in speculation. The prefix
ends at a chunk border: its keys and values are dead, and the last tokens attend to each other
alone. Their number is known, so the states after them go straight into the row's slot.
"""

from functools import partial
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax import numpy as jnp

from megalodon_jax.cache import Cache, LayerCache
from megalodon_jax.config import KvFormat, ModelConfig, WeightFormat
from megalodon_jax.inference.blocks import Emitted, RowStart, SlotState, put_request
from megalodon_jax.inference.decoders import AnyDecodeWeights
from megalodon_jax.inference.packed import Packed
from megalodon_jax.inference.prefix_cache import PrefixCache, reads_prefixes
from megalodon_jax.inference.requests import Stream
from megalodon_jax.inference.rows import put_row
from megalodon_jax.inference.sampling import Features
from megalodon_jax.inference.step import forward, rotation_of, step_norm
from megalodon_jax.inference.weights import DecodeWeights, NormVectors
from megalodon_jax.typing import Array, Float, Int32
from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_attention.types import accumulation_dtype
from pallas_kernels.chunk_decode import RotaryFactors, SharedRepresentation
from pallas_kernels.norm_state_step import NormStateStepOutput, TargetRows, norm_state_steps
from pallas_kernels.norm_state_step.xla import moments_after, norm_steps
from pallas_kernels.state_step import CemaStepTables
from pallas_kernels.state_step.xla import state_steps
from pallas_kernels.timestep_norm import TimestepNormState

MOST_TOKENS = 16
"""Most tokens behind a known prefix: more take a piece of prefill."""


class Continuation(NamedTuple):
    """Tokens behind a known beginning: NumPy or traced.

    Attributes:
      tokens: padded, int32 (T,).
      count: their number, at least 1, int32.
    """

    tokens: Any
    count: Any


class KnownPrompt(NamedTuple):
    """A prompt whose beginning is in the prefix cache.

    Attributes:
      states: one row after the beginning, without keys and values.
      continuation: the tokens behind it.
    """

    states: Cache
    continuation: Continuation


class KnownPrompts(NamedTuple):
    """Finds such prompts.

    Attributes:
      prefixes: the prefix cache.
      size: T, the tokens of the program.
    """

    prefixes: PrefixCache
    size: int

    @classmethod
    def of(
        cls,
        prefixes: PrefixCache | None,
        weights: AnyDecodeWeights,
        formats: tuple[WeightFormat, KvFormat],
        *,
        is_sharded: bool,
    ) -> Self | None:
        """None where the last tokens go through prefill.

        Rounded weights, keys and values would make a known prompt differ from a cold one, whose
        prefill rounds nothing; rows of a sharded batch run together.
        """
        if prefixes is None or is_sharded or formats != ("model", "model"):
            return None
        if not isinstance(weights, DecodeWeights):
            return None
        return cls(prefixes, min(MOST_TOKENS, weights.config.chunk_size))

    def find(self, streams: list[Stream]) -> KnownPrompt | None:
        """The prompt of a request, if it has one sample and at most T unknown tokens."""
        request = streams[0].request
        keeps_prompt = request.keep_session and request.params.stop
        if len(streams) > 1 or keeps_prompt or not reads_prefixes(request):
            return None
        tokens = request.tokens
        # A prompt that fills a chunk is a new prefix, which prefill keeps.
        count = len(tokens) % self.prefixes.chunk_size
        if not 0 < count <= self.size:
            return None
        known, states = self.prefixes.states(tokens)
        if states is None or known + count < len(tokens):
            return None
        padded = np.zeros(self.size, np.int32)
        padded[:count] = tokens[known:]
        return KnownPrompt(states, Continuation(padded, np.int32(count)))

    def example(self, cache: Cache) -> KnownPrompt:
        """A prompt of the same shapes, to compile the program; `cache` has a row or more."""
        states = self.prefixes.warm_up(cache)
        return KnownPrompt(states, Continuation(np.zeros(self.size, np.int32), np.int32(1)))


@partial(jax.jit, static_argnums=4, donate_argnums=0)
def start_known_row(
    slots: SlotState,
    weights: DecodeWeights,
    states: Cache,
    start: Packed[RowStart[Continuation]],
    features: Features,
    logits_mask: Int32[Array, "1 W"] | None = None,
) -> tuple[SlotState, Emitted]:
    """`blocks.start_row` from the state of a prefix and the tokens behind it.

    Args:
      slots: donated.
      weights: from `prepare`.
      states: of the prefix, see `KnownPrompt`; not donated.
      start: the slot, the tokens behind the prefix and the request.
      features: must cover the request's.
      logits_mask: allowed tokens of the first draw, see `sampling.draw`.

    Returns:
      The slots, and the first token (n = B = 1).
    """
    slot, (tokens, count), request = start.unpack()
    old = slots.cache
    config, position = weights.config, jnp.arange(len(tokens), dtype=jnp.int32)
    norm = states.layers[0].norm
    row = _LastTokens(
        config,
        count[None],
        slot,
        rotation_of(config, position),
        None if norm is None else norm.count,
    )
    layers = tuple(map(_row_layer, states.layers, old.layers))
    final_norm = _row_state(states.final_norm, old.final_norm)
    both: Any = Cache(states.position, states.segment, layers, final_norm)
    logits, layers, final_norm = forward(weights, both, tokens, row)
    # The last layers have no attention (`skip_attention`): their states stay as they are.
    num_complete = config.num_layers - config.skip_attention
    unchanged = (_put_before(layer, slot) for layer in layers[num_complete:])
    cache = Cache(
        put_row(old.position, slot, states.position + count),
        put_row(old.segment, slot, jnp.maximum(states.segment, 1)),
        (*layers[:num_complete], *unchanged),
        final_norm,
    )
    scores = jax.lax.dynamic_slice_in_dim(logits, count - 1, 1)
    return put_request(slots._replace(cache=cache), slot, scores, request, features, logits_mask)


class _RowState[T](NamedTuple):
    """A state of the row, and where it goes.

    Attributes:
      before: one row, before the tokens.
      slots: the states of all slots.
    """

    before: T
    slots: T


def _row_state(before: Any, slots: Any) -> Any:
    return None if before is None or slots is None else _RowState(before, slots)


def _row_layer(before: LayerCache, slots: LayerCache) -> Any:
    """The states of a layer; the prefix has no keys and values."""
    norm, cema = _row_state(before.norm, slots.norm), _row_state(before.cema, slots.cema)
    return slots._replace(norm=norm, cema=cema)


def _put_before(layer: Any, slot: Int32[Array, ""]) -> LayerCache:
    """The slots' states with those before the tokens in the row's slot."""

    def put(state: _RowState | None) -> Any:
        return None if state is None else put_row(state.slots, slot, state.before)

    return layer._replace(norm=put(layer.norm), cema=put(layer.cema))


class _LastTokens(NamedTuple):
    """T tokens at the beginning of a row's chunk; implements `step.RowOperations`, with R = T.

    The states are `_RowState`s, and the results the states of all slots.

    Attributes:
      config: of the model.
      count: the tokens that are no padding.
      slot: of the row.
      rotation: see `RowOperations`.
      norm_count: tokens that TimestepNorm has had, the same in every layer; None without it.
    """

    config: ModelConfig
    count: Int32[Array, " 1"]
    slot: Int32[Array, ""]
    rotation: RotaryFactors | None
    norm_count: Int32[Array, " 1"] | None

    def normalize(
        self, vectors: NormVectors, x: Float[Array, "T D"], state: _RowState[TimestepNormState]
    ) -> tuple[Float[Array, "T D"], TimestepNormState]:
        y, moments = norm_steps(x[None], step_norm(self.config, vectors), state.before)
        after = moments_after(self.count, state.before, moments)
        return y[0], put_row(state.slots, self.slot, after)

    def average(
        self, u: Float[Array, "T D"], tables: CemaStepTables, state: _RowState[Array]
    ) -> tuple[Float[Array, "T D"], Float[Array, "S 2N D"]]:
        y, _ = state_steps(u[None], tables, state.before)
        _, after = state_steps(u[None], tables, state.before, self.count)
        return y[0], put_row(state.slots, self.slot, after)

    def normalize_and_average(
        self,
        vectors: NormVectors,
        x: Float[Array, "T D"],
        norm: _RowState[TimestepNormState],
        tables: CemaStepTables,
        cema: _RowState[Array],
    ) -> NormStateStepOutput:
        assert self.norm_count is not None
        u, y, new_norm, state = norm_state_steps(
            x[None],
            step_norm(self.config, vectors),
            norm.before._replace(count=self.norm_count),
            tables,
            cema.before,
            self.count,
            target=TargetRows(norm.slots, cema.slots, self.slot),
        )
        return NormStateStepOutput(u[0], y[0], new_norm, state)

    def attend(
        self,
        shared: SharedRepresentation,
        value: Float[Array, "T H Dv"],
        gate: Float[Array, "T H Dv"],
        cache: KeyValueCache,
    ) -> tuple[Float[Array, "T H Dv"], KeyValueCache]:
        query, key = shared.queries_and_keys(value.dtype)
        out = _attend_inside(query, key, value) * jax.nn.silu(gate)
        new = KeyValueCache(*(_fill_slots(each, self.config.chunk_size) for each in (key, value)))
        return out.astype(value.dtype), put_row(cache, self.slot, new)


def _attend_inside(
    query: Float[Array, "T H Dk"], key: Float[Array, "T H Dk"], value: Float[Array, "T H Dv"]
) -> Float[Array, "T H Dv"]:
    """Causal attention of a few tokens, as sums: a GPU runs a product's preparation as kernels."""
    wide = accumulation_dtype(query.dtype)
    query, key, value = (each.astype(wide) for each in (query, key, value))
    T = len(query)
    scores = jnp.sum(query[:, None] * key[None], axis=-1)
    is_seen = jnp.arange(T) <= jnp.arange(T)[:, None]
    weights = jax.nn.softmax(jnp.where(is_seen[..., None], scores, -jnp.inf), axis=1)
    return jnp.sum(weights[..., None] * value[None], axis=1)


def _fill_slots(x: Float[Array, "T H D"], chunk_size: int) -> Float[Array, "1 H C D"]:
    """Keys or values in a row's slots, zeros in the others: the slot may hold NaN of a request."""
    return jnp.pad(x.swapaxes(0, 1)[None], ((0, 0), (0, 0), (0, chunk_size - len(x)), (0, 0)))
