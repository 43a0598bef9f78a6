"""Prompts that are known up to their last tokens: one program from the prefix to the first token.

A prefill piece runs the operations of training, which are many small kernels for few tokens. Here
the last tokens go through the kernels of decoding, several at once, as in speculation. The prefix
ends at a chunk border, so that the row needs no keys and values of it.
"""

from functools import partial
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax import numpy as jnp

from megalodon_jax.cache import Cache, LayerCache
from megalodon_jax.config import KvFormat, WeightFormat
from megalodon_jax.inference.blocks import Emitted, RowRequest, SlotState, put_started_row
from megalodon_jax.inference.decoders import AnyDecodeWeights
from megalodon_jax.inference.positions import commit, decode_positions
from megalodon_jax.inference.prefix_cache import PrefixCache, reads_prefixes
from megalodon_jax.inference.requests import Stream
from megalodon_jax.inference.sampling import Features
from megalodon_jax.inference.weights import DecodeWeights
from megalodon_jax.typing import Array, Int32

MOST_TOKENS = 16
"""Most tokens behind a known prefix: more take a piece of prefill."""


class KnownPrompt(NamedTuple):
    """A prompt whose beginning is in the prefix cache: NumPy or traced.

    Attributes:
      states: one row after the beginning, without keys and values.
      tokens: the tokens behind it, padded, int32 (1, T).
      count: their number, at least 1.
    """

    states: Cache
    tokens: Any
    count: Any


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
        tokens = np.asarray(request.prompt, np.int32)
        # A prompt that fills a chunk is a new prefix, which prefill keeps.
        count = len(tokens) % self.prefixes.chunk_size
        if not 0 < count <= self.size:
            return None
        known, states = self.prefixes.states(tokens)
        if states is None or known + count < len(tokens):
            return None
        padded = np.zeros((1, self.size), np.int32)
        padded[0, :count] = tokens[known:]
        return KnownPrompt(states, padded, np.int32(count))

    def example(self, cache: Cache) -> KnownPrompt:
        """A prompt of the same shapes, to compile the program; `cache` has a row or more."""
        states = self.prefixes.warm_up(cache)
        return KnownPrompt(states, np.zeros((1, self.size), np.int32), np.int32(1))


@partial(jax.jit, static_argnums=5, donate_argnums=0)
def start_known_row(
    slots: SlotState,
    slot: Int32[Array, ""] | int,
    weights: DecodeWeights,
    prompt: KnownPrompt,
    request: RowRequest,
    features: Features,
    logits_mask: Int32[Array, "1 W"] | None = None,
) -> tuple[SlotState, Emitted]:
    """`blocks.start_row` from the state of a prefix and the tokens behind it.

    Args:
      slots: donated.
      slot: index.
      weights: from `prepare`.
      prompt: the prompt; its states are not donated.
      request: the request.
      features: must cover the request's.
      logits_mask: allowed tokens of the first draw, see `sampling.draw`.

    Returns:
      The slots, and the first token (n = B = 1).
    """
    cache = _with_empty_slots(prompt.states, slots.cache)
    logits, cache, pending = decode_positions(weights, cache, jnp.asarray(prompt.tokens))
    cache = commit(weights, cache, pending, jnp.reshape(prompt.count, 1))
    return put_started_row(
        slots, slot, cache, logits[:, prompt.count - 1], request, features, logits_mask
    )


def _with_empty_slots(states: Cache, slots: Cache) -> Cache:
    """The row with keys and values of zeros: the slot may hold NaN of the request before."""

    def complete(layer: LayerCache, of_slots: LayerCache) -> LayerCache:
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), of_slots.keys_and_values
        )
        return layer._replace(keys_and_values=zeros)

    layers = map(complete, states.layers, slots.layers)
    return Cache(states.position, states.segment, tuple(layers), states.final_norm)
