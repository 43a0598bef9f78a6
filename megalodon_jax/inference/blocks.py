"""Device programs of generation: rows enter slots, and blocks of decoding steps run over them."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from megalodon_jax.inference.decoders import AnyDecodeWeights, decode
from megalodon_jax.inference.packed import Packed
from megalodon_jax.inference.prefill import PrefillState
from megalodon_jax.inference.rows import (
    constrain_cache,
    put_row,
    replicate,
    set_rows,
    take_row,
)
from megalodon_jax.inference.sampling import (
    Drawn,
    Features,
    Logprobs,
    SamplingParams,
    SamplingState,
    draw,
    fill_row,
    sampling_row,
)
from megalodon_jax.inference.weights import DecodeWeights
from megalodon_jax.typing import Array, Bool, Float32, Int32

MAX_STOP_IDS = 16
"""Most stop ids of a request: they are compared on the device."""


class SlotState(NamedTuple):
    """The state of S slots on the device; a slot runs at most one request.

    Attributes:
      cache: the model's cache.
      sampling: parameters and progress of the draws.
      token: the last drawn token, which the next step feeds.
      active: slots whose request goes on.
      remaining: tokens that the request may still draw.
      stop_ids: tokens that end it; -1 where there is none.
    """

    cache: Any
    sampling: SamplingState
    token: Int32[Array, " S"]
    active: Bool[Array, " S"]
    remaining: Int32[Array, " S"]
    stop_ids: Int32[Array, "S 16"]


class RowRequest(NamedTuple):
    """Arrays of a request for its slot, besides its prefilled cache: NumPy or traced.

    Attributes:
      sampling: from `sampling_row`, for the features of the draw.
      remaining: tokens that it may draw, at least 1.
      stop_ids: padded with -1, (16,).
    """

    sampling: SamplingState
    remaining: Any
    stop_ids: Any


class RowStart[T](NamedTuple):
    """A request, its slot, and where in the source of its state it is.

    Attributes:
      slot: index, int32.
      source: for `start_row`, the row of the prefilled state, int32; for `start_known_row`, a
        `known_prompt.Continuation`.
      request: the request.
    """

    slot: Any
    source: T
    request: RowRequest


class Emitted(NamedTuple):
    """Tokens of some steps, as one array, which the host reads at once.

    Attributes:
      words: of every token, its id, whether it is valid, the bits of its log-probability, the k
        most probable ids, and the bits of their log-probabilities; on the device or the host.
    """

    words: Int32[Array, "n B w"]

    @classmethod
    def of(
        cls, tokens: Int32[Array, "n B"], logprobs: Logprobs, valid: Bool[Array, "n B"]
    ) -> "Emitted":
        """Joins the arrays; call it inside `jit`."""

        def bits(x: Array) -> Array:
            return jax.lax.bitcast_convert_type(x, jnp.int32)

        single = jnp.stack([tokens, valid.astype(jnp.int32), bits(logprobs.token)], axis=-1)
        return cls(jnp.concatenate([single, logprobs.top_ids, bits(logprobs.top)], axis=-1))

    @classmethod
    def empty(cls, steps: int, rows: int, features: Features) -> "Emitted":
        """Steps without tokens, of the shape of those with these features."""
        return cls(jnp.full((steps, rows, 3 + 2 * (features.logprobs or 0)), -1, jnp.int32))

    @property
    def tokens(self) -> Int32[Array, "n B"]:
        """Drawn tokens; -1 where the slot was not active."""
        return self.words[..., 0]

    @property
    def valid(self) -> Bool[Array, "n B"]:
        """See `sampling.Drawn`."""
        return self.words[..., 1] != 0

    @property
    def logprobs(self) -> Logprobs:
        """Log-probabilities of the tokens."""
        floats = self.words.view(np.float32)
        end = (self.words.shape[-1] + 3) // 2
        return Logprobs(floats[..., 2], self.words[..., 3:end], floats[..., end:])


def padded_stop_ids(stop_ids: tuple[int, ...]) -> np.ndarray:
    """An array of `MAX_STOP_IDS` ids, -1 where there is none.

    Raises:
      ValueError: there are more.
    """
    if len(stop_ids) > MAX_STOP_IDS:
        raise ValueError(f"{len(stop_ids)} stop ids; use at most {MAX_STOP_IDS}")
    padded = np.full(MAX_STOP_IDS, -1, np.int32)
    padded[: len(stop_ids)] = stop_ids
    return padded


def pack_start[T](
    slot: int,
    source: T,
    params: SamplingParams,
    features: Features,
    *,
    vocab_size: int,
    num_tokens: int | None = None,
    prompt: Sequence[int] | np.ndarray = (),
    seed: int | None = None,
) -> Packed[RowStart[T]]:
    """A `RowStart` from a request's parameters; arguments and errors as `sampling_row`."""
    row = sampling_row(
        params,
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        prompt=prompt,
        seed=seed,
        features=features,
    )
    request = RowRequest(row, np.int32(params.max_tokens), padded_stop_ids(params.stop_ids))
    return Packed.of(RowStart(np.int32(slot), source, request))


def empty_slots(cache: Any, sampling: SamplingState) -> SlotState:
    """Slots without requests, for a cache of as many rows; call it inside `jit`."""
    S = sampling.temperature.shape[0]
    return SlotState(
        cache,
        sampling,
        token=jnp.zeros(S, jnp.int32),
        active=jnp.zeros(S, bool),
        remaining=jnp.zeros(S, jnp.int32),
        stop_ids=jnp.full((S, MAX_STOP_IDS), -1, jnp.int32),
    )


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def start_row(
    slots: SlotState,
    prefilled: PrefillState,
    start: Packed[RowStart[Int32[Array, ""]]],
    features: Features,
    logits_mask: Int32[Array, "1 W"] | None = None,
) -> tuple[SlotState, Emitted]:
    """Puts a prefilled row into a slot, and draws its first token.

    Args:
      slots: donated.
      prefilled: not donated, so that several requests can start from a row.
      start: the slot, the row of `prefilled` and the request.
      features: must cover the request's.
      logits_mask: allowed tokens of the first draw, see `sampling.draw`.

    Returns:
      The slots, and the first token (n = B = 1).
    """
    slot, row, request = start.unpack()
    cache, logits = replicate(take_row(prefilled, row))
    slots = slots._replace(cache=put_row(slots.cache, slot, cache))
    return put_request(slots, slot, logits, request, features, logits_mask)


def put_request(
    slots: SlotState,
    slot: Int32[Array, ""],
    logits: Float32[Array, "1 V"],
    request: RowRequest,
    features: Features,
    logits_mask: Int32[Array, "1 W"] | None,
) -> tuple[SlotState, Emitted]:
    """`start_row` where the slot's cache and the row's scores are ready; call it inside `jit`."""
    filled = fill_row(request.sampling, vocab_size=logits.shape[1])
    sampling = jax.tree.map(lambda leaf: leaf[None], filled)
    drawn = draw(logits, sampling, features, logits_mask=logits_mask)
    ended = _ends(drawn.tokens, request.stop_ids[None], request.remaining[None])
    started = SlotState(
        slots.cache,
        put_row(slots.sampling, slot, drawn.state),
        slots.token.at[slot].set(drawn.tokens[0]),
        slots.active.at[slot].set(~ended[0]),
        slots.remaining.at[slot].set(request.remaining - 1),
        slots.stop_ids.at[slot].set(request.stop_ids),
    )
    return constrain_slots(started), jax.tree.map(
        lambda leaf: leaf[None], _emitted(drawn, jnp.ones(1, bool))
    )


@partial(jax.jit, donate_argnums=0)
def deactivate(slots: SlotState, keep: Bool[Array, " S"]) -> SlotState:
    """Ends the requests of the slots where `keep` is false.

    They are at position 0 from then on, so that steps of other slots read no keys and values there.
    """
    position = jnp.where(keep, slots.cache.position, 0)
    cache = dataclasses.replace(slots.cache, position=position)
    return constrain_slots(slots._replace(cache=cache, active=slots.active & keep))


@partial(jax.jit, donate_argnums=0)
def move_slot(slots: SlotState, source: Int32[Array, ""], target: Int32[Array, ""]) -> SlotState:
    """Moves a request to another slot; its own is free afterwards."""
    moved = put_row(slots, target, take_row(slots, source))
    return moved._replace(active=moved.active & (jnp.arange(len(moved.active)) != source))


def constrain_slots(slots: SlotState) -> SlotState:
    """The slots sharded over a mesh: the cache by rows and features, the rest on every device."""
    return replicate(slots._replace(cache=None))._replace(cache=constrain_cache(slots.cache))


@partial(jax.jit, static_argnums=(2, 3, 4), donate_argnums=1)
def decode_block(
    weights: AnyDecodeWeights,
    slots: SlotState,
    rows: int,
    length: int,
    features: Features,
    logits_mask: Int32[Array, "B W"] | None = None,
) -> tuple[SlotState, Emitted]:
    """Some decoding steps of the first slots.

    Args:
      weights: from `prepare_decoding`.
      slots: donated; updated in place.
      rows: slots that run, B.
      length: steps, n.
      features: must cover those of every active slot.
      logits_mask: allowed tokens of the draw, for blocks of one step.

    Returns:
      The slots, and the drawn tokens.
    """
    first = first_rows(slots._replace(cache=None), rows)

    def step(carry: tuple[Any, SlotState], _) -> tuple[tuple[Any, SlotState], Emitted]:
        cache, state = carry
        cache = _restore_counts(weights, cache)
        logits, cache = decode(weights, cache, state.token, state.active)
        cache = _drop_counts(weights, cache)
        drawn = draw(logits, state.sampling, features, logits_mask=logits_mask, active=state.active)
        ended = _ends(drawn.tokens, state.stop_ids, state.remaining)
        emitted = _emitted(drawn, state.active)
        state = state._replace(
            sampling=drawn.state,
            token=jnp.where(state.active, drawn.tokens, state.token),
            active=state.active & ~ended,
            remaining=state.remaining - state.active,
        )
        return (cache, state), emitted

    carry = (_drop_counts(weights, slots.cache), first)
    (cache, state), emitted = jax.lax.scan(step, carry, length=length)
    cache = _restore_counts(weights, cache)
    rest = jax.tree.map(set_rows, slots._replace(cache=None), state)
    return constrain_slots(rest._replace(cache=cache)), replicate(emitted)


def _drop_counts(weights: Any, cache: Any) -> Any:
    """The cache without TimestepNorm's counts but the first layer's, for the carry of a loop.

    Layers have the same counts. One for each would take a kernel a layer in a step of one row,
    where the compiler does not merge them. Caches of other models are returned as they are.
    """
    return _set_later_counts(weights, cache, None)


def _restore_counts(weights: Any, cache: Any) -> Any:
    """The cache before `_drop_counts`."""
    norm = cache.layers[0].norm if isinstance(weights, DecodeWeights) else None
    return cache if norm is None else _set_later_counts(weights, cache, norm.count)


def _set_later_counts(weights: Any, cache: Any, count: Int32[Array, " S"] | None) -> Any:
    if not isinstance(weights, DecodeWeights) or cache.layers[0].norm is None:
        return cache
    # Layers without attention keep the states that came in.
    end = weights.config.num_layers - weights.config.skip_attention
    layers = [
        layer._replace(norm=layer.norm._replace(count=count)) if 0 < number < end else layer
        for number, layer in enumerate(cache.layers)
    ]
    return dataclasses.replace(cache, layers=tuple(layers))


def _ends(
    tokens: Int32[Array, " B"], stop_ids: Int32[Array, "B 16"], remaining: Int32[Array, " B"]
) -> Bool[Array, " B"]:
    return jnp.any(tokens[:, None] == stop_ids, axis=1) | (remaining <= 1)


def _emitted(drawn: Drawn, active: Bool[Array, " B"]) -> Emitted:
    return Emitted.of(jnp.where(active, drawn.tokens, -1), drawn.logprobs, drawn.valid)


def first_rows[T](tree: T, rows: int) -> T:
    """The first rows of every leaf."""
    return jax.tree.map(lambda leaf: leaf[:rows], tree)
