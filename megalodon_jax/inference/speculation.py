"""Prompt-lookup speculation: drafts from the row's own tokens, checked several at once.

Where the last tokens of a row occurred before, the tokens behind that occurrence are its drafts
(Saxena 2023). One pass of the model scores all of them. Every position is drawn from the model's
scores with the random numbers of the plain draw, and a draft is accepted while it equals the drawn
token. The tokens are therefore those of plain decoding, up to the rounding of the scores: products
over several tokens may add in another order, and two scores that are equal but for their last bits
may change places. Nothing is read on the host, so blocks of steps overlap as in plain decoding.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax import numpy as jnp

from megalodon_jax.inference.blocks import Emitted, SlotState, first_rows
from megalodon_jax.inference.decoders import AnyDecodeWeights
from megalodon_jax.inference.positions import commit, decode_positions
from megalodon_jax.inference.rows import put_row, set_rows, take_row
from megalodon_jax.inference.sampling import Features, advance, draw_positions
from megalodon_jax.inference.scheduling import BLOCK_LENGTHS, Buckets, block_length
from megalodon_jax.inference.warm_up import Program
from megalodon_jax.inference.weights import DecodeWeights
from megalodon_jax.typing import Array, Bool, Int32

SPECULATIVE_LENGTHS = BLOCK_LENGTHS[:2]
"""Steps of a speculative block: each draws up to 1 + `num_drafts` tokens of a row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationSettings:
    """How an engine speculates.

    Attributes:
      num_drafts: drafts of a step, k >= 1.
      max_rows: speculate in buckets of at most so many rows, where reading the weights is most of
        a step's time.
      window: tokens of prompt and answer in which drafts are looked for, at least 4.
    """

    num_drafts: int = 4
    max_rows: int = 8
    window: int = 2048

    def __post_init__(self) -> None:
        for name, least in (("num_drafts", 1), ("max_rows", 2), ("window", 4)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least {least}")


def empty_history(slots: int, window: int) -> Int32[Array, "S W"]:
    """The last W tokens of every slot, the latest at the end; -1 before the first one."""
    return jnp.full((slots, window), -1, jnp.int32)


def append_tokens(
    history: Int32[Array, "B W"], tokens: Int32[Array, "B n"], counts: Int32[Array, " B"]
) -> Int32[Array, "B W"]:
    """The history after the first `counts` tokens of each row."""
    joined = jnp.concatenate([history, tokens], axis=1)
    index = counts[:, None] + jnp.arange(history.shape[1])
    return jnp.take_along_axis(joined, index, axis=1)


def look_up(history: Int32[Array, "B W"], num_drafts: int) -> Int32[Array, "B k"]:
    """The tokens behind the latest earlier occurrence of the last three, else two, tokens.

    An occurrence d tokens before the end is followed by d known tokens; where d < k, the drafts
    repeat them.

    Args:
      history: the last tokens; its last column is the token that the model is fed next.
      num_drafts: k.

    Returns:
      Drafts; -1 in a row without an occurrence.
    """
    W = history.shape[1]

    def matches(back: int) -> Bool[Array, "B W"]:
        """Whether the token `back` before an index is that before the last one."""
        wanted = history[:, W - 1 - back, None]
        same = (history == wanted) & (wanted >= 0)
        return jnp.pad(same, ((0, 0), (back, 0)))[:, :W]

    two = matches(0) & matches(1)
    index = jnp.arange(W)
    # Three tokens come before two, then the latest occurrence.
    rank = jnp.where(two & matches(2), index + W, jnp.where(two, index, -1))[:, :-1]
    end = jnp.argmax(rank, axis=1)[:, None]
    behind = end + 1 + jnp.arange(num_drafts) % (W - 1 - end)
    is_found = jnp.max(rank, axis=1, keepdims=True) >= 0
    return jnp.where(is_found, jnp.take_along_axis(history, behind, axis=1), -1)


class SpeculativeBlock(NamedTuple):
    """Result of `speculative_block`."""

    slots: SlotState
    history: Int32[Array, "S W"]
    emitted: Emitted


class SpeculatedBlock(NamedTuple):
    """A block handed to the device, and about how many tokens a row gets in it."""

    slots: SlotState
    emitted: Emitted
    expected: int


@partial(jax.jit, static_argnums=(3, 4, 5, 6), donate_argnums=(1, 2))
def speculative_block(
    weights: DecodeWeights,
    slots: SlotState,
    history: Int32[Array, "S W"],
    rows: int,
    length: int,
    features: Features,
    num_drafts: int,
) -> SpeculativeBlock:
    """Some speculative steps of the first slots: the slots afterwards are those of plain decoding.

    Args:
      weights: from `prepare`.
      slots: donated; updated in place.
      history: of every slot, the pending token `slots.token` included; donated. Its content changes
        the number of accepted drafts, and no token.
      rows: slots that run, B.
      length: steps, n.
      features: must cover those of every active slot.
      num_drafts: drafts of a step, k.

    Returns:
      The slots and their history; n (k + 1) tokens, in which a step's accepted tokens are followed
      by -1.
    """
    # The rows' keys and values leave the others once a block: products with some rows of an array
    # would copy them in every step.
    first = first_rows(slots, rows)
    step = partial(_step, weights, features=features, num_drafts=num_drafts)
    carry = (first.cache, first._replace(cache=None), history[:rows])
    (cache, state, window), emitted = jax.lax.scan(step, carry, length=length)
    slots = jax.tree.map(set_rows, slots, state._replace(cache=cache))
    emitted = jax.tree.map(lambda leaf: jax.lax.collapse(leaf, 0, 2), emitted)
    return SpeculativeBlock(slots, set_rows(history, window), emitted)


def _step(
    weights: DecodeWeights, carry: Any, _: None, *, features: Features, num_drafts: int
) -> tuple[Any, Emitted]:
    cache, state, window = carry
    B = len(window)
    # Attention does not cross a chunk's border, and the slots behind it are those of its beginning.
    tokens_to_border = weights.config.chunk_size - cache.position[:B] % weights.config.chunk_size
    is_inside = jnp.arange(1, num_drafts + 1) < tokens_to_border[:, None]
    drafts = jnp.where(is_inside, look_up(window, num_drafts), -1)
    tokens = jnp.concatenate([state.token[:, None], jnp.maximum(drafts, 0)], axis=1)
    logits, cache, pending = decode_positions(weights, cache, tokens)
    drawn = draw_positions(logits, drafts, state.sampling, features)
    counts, ended = _count_emitted(drawn.tokens, drawn.accepted, state)
    # The last emitted token is pending: as many tokens were fed as are emitted.
    cache = commit(weights, cache, pending, counts)
    last = jnp.take_along_axis(drawn.tokens, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
    is_emitted = jnp.arange(num_drafts + 1) < counts[:, None]
    emitted = Emitted.of(jnp.where(is_emitted, drawn.tokens, -1), drawn.logprobs, drawn.valid)
    state = state._replace(
        sampling=advance(state.sampling, drawn.tokens, counts, features),
        token=jnp.where(state.active, last, state.token),
        active=state.active & ~ended,
        remaining=state.remaining - counts,
    )
    window = append_tokens(window, drawn.tokens, counts)
    return (cache, state, window), jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), emitted)


def _count_emitted(
    tokens: Int32[Array, "B T"], accepted: Int32[Array, " B"], state: SlotState
) -> tuple[Int32[Array, " B"], Bool[Array, " B"]]:
    """Accepted tokens up to the one that ends the row, and whether one does."""
    is_stop = jnp.any(tokens[..., None] == state.stop_ids[:, None], axis=-1)
    is_last = state.remaining[:, None] - jnp.arange(tokens.shape[1]) <= 1
    goes_on = ~(is_stop | is_last)
    until_end = 1 + jnp.sum(jnp.cumprod(goes_on, axis=1), axis=1, dtype=jnp.int32)
    counts = jnp.where(state.active, jnp.minimum(accepted, until_end), 0)
    return counts, state.active & (until_end <= accepted)


class Speculator:
    """The speculation of an engine: histories on the device, acceptance on the host.

    Args:
      settings: how to speculate.
      slots: of the engine.
    """

    def __init__(self, settings: SpeculationSettings, slots: int):
        self.settings = settings
        self._history = _empty_history(slots, settings.window)
        self._steps = self._accepted = 0

    @classmethod
    def of(
        cls, settings: SpeculationSettings, weights: AnyDecodeWeights, buckets: Buckets, slots: int
    ) -> Self:
        """The speculation of an engine with these weights and buckets.

        Raises:
          ValueError: the model cannot take drafts back, or no bucket has so few rows.
        """
        if not isinstance(weights, DecodeWeights):
            name = type(weights.model()).__name__
            raise ValueError(f"speculation runs MEGALODON alone, not {name}; pass speculation=None")
        if settings.max_rows < buckets.sizes[0]:
            raise ValueError(
                f"max_rows is {settings.max_rows}, but the engine runs at least "
                f"{buckets.sizes[0]} rows: it would never speculate"
            )
        return cls(settings, slots)

    @property
    def acceptance(self) -> float:
        """Accepted drafts of a row in a step, the mean of all so far; 0 before the first step."""
        return self._accepted / max(self._steps, 1)

    def runs(self, rows: int) -> bool:
        """Whether a bucket of so many rows speculates."""
        return rows <= self.settings.max_rows

    def start(self, slot: int, prompt: np.ndarray, first: Emitted) -> None:
        """Begins a slot's history with a prompt and the first token of the answer."""
        window = self.settings.window
        kept = np.asarray(prompt, np.int32)[-window:]
        kept = np.pad(kept, (window - len(kept), 0), constant_values=-1)
        self._history = _start(self._history, slot, kept[None], first)

    def move(self, source: int, target: int) -> None:
        """Moves a slot's history."""
        self._history = _move(self._history, source, target)

    def add(self, emitted: Emitted) -> None:
        """Adds the tokens of a plain block to the histories."""
        self._history = _add(self._history, emitted)

    def decode_block(
        self,
        weights: DecodeWeights,
        slots: SlotState,
        rows: int,
        most_remaining: int,
        features: Features,
    ) -> SpeculatedBlock:
        """A block for about `most_remaining` tokens of a row."""
        tokens_a_step = 1 + self.acceptance
        steps = block_length(
            round(most_remaining / tokens_a_step),
            is_short=False,
            is_filling=False,
            is_constrained=False,
            lengths=SPECULATIVE_LENGTHS,
        )
        slots, self._history, emitted = speculative_block(
            weights, slots, self._history, rows, steps, features, self.settings.num_drafts
        )
        return SpeculatedBlock(slots, emitted, round(steps * tokens_a_step))

    def count(self, tokens: Int32[np.ndarray, "n B"]) -> None:
        """Counts accepted drafts in the tokens of a speculative block."""
        drawn = (tokens >= 0).reshape(-1, self.settings.num_drafts + 1, tokens.shape[1]).sum(axis=1)
        self._steps += int((drawn > 0).sum())
        self._accepted += int(np.maximum(drawn - 1, 0).sum())

    def programs(
        self,
        weights: DecodeWeights,
        slots: SlotState,
        buckets: Sequence[int],
        features: Sequence[Features],
    ) -> Iterator[Program]:
        """Programs of speculative steps."""
        drafts = self.settings.num_drafts
        for rows in filter(self.runs, buckets):
            for each in features:
                for length in SPECULATIVE_LENGTHS:
                    arguments = (weights, slots, self._history, rows, length, each, drafts)
                    yield Program(speculative_block, arguments)

    def warm_up(
        self,
        weights: DecodeWeights,
        slots: SlotState,
        buckets: Sequence[int],
        features: Sequence[Features],
    ) -> SlotState:
        """Compiles everything; the slots must have no requests."""
        for rows in buckets:
            for length, each in itertools.product(BLOCK_LENGTHS, features):
                self._history = _add(self._history, Emitted.empty(length, rows, each))
            for each in features if self.runs(rows) else ():
                for length in SPECULATIVE_LENGTHS:
                    slots, self._history, _ = speculative_block(
                        weights, slots, self._history, rows, length, each, self.settings.num_drafts
                    )
        prompt = np.full((1, self.settings.window), -1, np.int32)
        for each in features:
            self._history = _start(self._history, 0, prompt, Emitted.empty(1, 1, each))
        self.move(0, 0)
        return slots


_empty_history = jax.jit(empty_history, static_argnums=(0, 1))


@partial(jax.jit, donate_argnums=0)
def _start(
    history: Int32[Array, "S W"],
    slot: Int32[Array, ""],
    prompt: Int32[Array, "1 W"],
    first: Emitted,
) -> Int32[Array, "S W"]:
    return put_row(history, slot, append_tokens(prompt, first.tokens, jnp.ones(1, jnp.int32)))


@partial(jax.jit, donate_argnums=0)
def _move(
    history: Int32[Array, "S W"], source: Int32[Array, ""], target: Int32[Array, ""]
) -> Int32[Array, "S W"]:
    return put_row(history, target, take_row(history, source))


@partial(jax.jit, donate_argnums=0)
def _add(history: Int32[Array, "S W"], emitted: Emitted) -> Int32[Array, "S W"]:
    tokens = emitted.tokens
    counts = jnp.sum(tokens >= 0, axis=0, dtype=jnp.int32)
    return set_rows(history, append_tokens(history[: tokens.shape[1]], tokens.T, counts))
