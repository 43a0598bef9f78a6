"""Prefill: a prompt through the model in pieces, with the operations of training."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import KvFormat
from megalodon_jax.inference.rows import constrain_cache
from megalodon_jax.inference.sampling import MAX_LOGPROBS, Logprobs, token_logprobs
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.parallel.sharding import constrain
from megalodon_jax.typing import Array, Float, Float32, Int32

# The longest piece, in pieces of the model's own length: chunks of 2,048 tokens give 16,384.
_LONGEST = 8
_SHORTEST_PADDED = 16
# Tokens whose scores are computed at a time, for log-probabilities of a prompt.
_SCORED_TOKENS = 256


class Piece(NamedTuple):
    """A part of a prompt.

    Attributes:
      start: its first token.
      count: its tokens.
      size: the length of the program that runs it.
      is_whole: whether this program has no padding; a padded one may still be full.
    """

    start: int
    count: int
    size: int
    is_whole: bool


@dataclasses.dataclass(frozen=True)
class PieceSizes:
    """Lengths that are compiled.

    Attributes:
      whole: of pieces without padding, the longest first.
      padded: of the last piece, the shortest first.
    """

    whole: tuple[int, ...]
    padded: tuple[int, ...]

    @classmethod
    def for_model(cls, model: LanguageModel) -> "PieceSizes":
        """Eight and one chunks whole; padded to 16, 64, 256, ... tokens up to a chunk."""
        longest = model.piece_length
        padded, size = [], _SHORTEST_PADDED
        while size < longest:
            padded.append(size)
            size *= 4
        return cls((_LONGEST * longest, longest), (*padded, longest))

    def split(self, length: int, start: int = 0) -> Iterator[Piece]:
        """Pieces of a prompt of `length` tokens, of which `start` have been seen."""
        for size in self.whole:
            while length - start >= size:
                yield Piece(start, size, size, is_whole=True)
                start += size
        if start < length:
            count = length - start
            size = next(size for size in self.padded if size >= count)
            yield Piece(start, count, size, is_whole=False)


class PrefillState(NamedTuple):
    """The state between two pieces: the cache, and the scores after the last token of each row."""

    cache: Any
    logits: Float32[Array, "B V"]


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def empty_prefill_state(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch_size: int,
    max_length: int | None = None,
    kv: KvFormat = "model",
) -> PrefillState:
    """The state before the first token. No two arrays share a buffer: it can be donated."""
    model: LanguageModel = nnx.merge(graphdef, params)
    logits = jnp.zeros((batch_size, model.config.num_outputs), jnp.float32)
    cache = model.init_cache(batch_size, max_length=max_length, kv=kv)
    return _constrained(PrefillState(cache, logits))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_whole(
    graphdef: nnx.GraphDef, params: nnx.State, state: PrefillState, tokens: Int32[Array, "B L"]
) -> PrefillState:
    """A piece without padding: no segment ids, hence no masks per token."""
    model: LanguageModel = nnx.merge(graphdef, params)
    hidden, cache = model.hidden(tokens, cache=state.cache)
    return _constrained(PrefillState(cache, model.logits(hidden[:, -1])))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_padded(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: PrefillState,
    tokens: Int32[Array, "B L"],
    counts: Int32[Array, " B"],
) -> PrefillState:
    """A piece whose rows have `counts` tokens, 0 to L; a row without tokens keeps its state."""
    return _prefill_padded(nnx.merge(graphdef, params), state, tokens, counts)[0]


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_scored(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: PrefillState,
    tokens: Int32[Array, "B L"],
    counts: Int32[Array, " B"],
    targets: Int32[Array, "B L"],
) -> tuple[PrefillState, Logprobs]:
    """`prefill_padded`, and the log-probability of the token that follows each token."""
    model: LanguageModel = nnx.merge(graphdef, params)
    state, hidden = _prefill_padded(model, state, tokens, counts)
    return state, score_hidden(model, hidden, targets, MAX_LOGPROBS)


def score_hidden(
    model: LanguageModel,
    hidden: Float[Array, "B L D"],
    targets: Int32[Array, "B L"],
    num_top: int,
) -> Logprobs:
    """Log-probabilities of `targets` under the scores of `hidden`, and of the most probable tokens.

    Args:
      model: the model, for its output matrix.
      hidden: features after the final norm.
      targets: token ids.
      num_top: static; the number of most probable tokens.
    """
    B, L = targets.shape
    # Scores of all tokens at once would be larger than everything else.
    size = min(L, _SCORED_TOKENS)
    after = -L % size

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, after), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    def score(operands: tuple[Array, Array]) -> Logprobs:
        return token_logprobs(model.logits(operands[0]), operands[1], num_top)

    scored = jax.lax.map(score, (split(hidden), split(targets)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :L], scored)


def _prefill_padded(
    model: LanguageModel,
    state: PrefillState,
    tokens: Int32[Array, "B L"],
    counts: Int32[Array, " B"],
) -> tuple[PrefillState, Float[Array, "B L D"]]:
    L = tokens.shape[1]
    has_tokens = counts > 0
    # The cache's document goes on; a new row's first document has the id 1.
    segment = jnp.maximum(state.cache.segment, 1)[:, None]
    segment_ids = jnp.where(jnp.arange(L) < counts[:, None], segment, 0)
    cache = dataclasses.replace(
        state.cache, segment=jnp.where(has_tokens, segment[:, 0], state.cache.segment)
    )
    hidden, cache = model.hidden(tokens, segment_ids=segment_ids, cache=cache)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    logits = model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    logits = jnp.where(has_tokens[:, None], logits, state.logits)
    return _constrained(PrefillState(cache, logits)), hidden


def _constrained(state: PrefillState) -> PrefillState:
    return PrefillState(constrain_cache(state.cache), constrain(state.logits, "batch", None))


def prefill_piece(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: PrefillState,
    prompts: np.ndarray,
    lengths: np.ndarray,
    piece: Piece,
) -> PrefillState:
    """One piece of a batch of prompts.

    Args:
      graphdef: of the model.
      params: of the model; matrices may be cast (`decoders.cast_matrices`).
      state: before the piece; donated.
      prompts: token ids (B, P), right-padded.
      lengths: tokens of each prompt.
      piece: from `PieceSizes.split` of the longest prompt.
    """
    function, arguments = piece_call(graphdef, params, state, prompts, lengths, piece)
    return function(*arguments)


def piece_call(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: PrefillState,
    prompts: np.ndarray,
    lengths: np.ndarray,
    piece: Piece,
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted function that `prefill_piece` calls, and its arguments."""
    counts = np.clip(lengths - piece.start, 0, piece.count).astype(np.int32)
    if piece.is_whole and counts.min() == piece.size:
        tokens = prompts[:, piece.start : piece.start + piece.count]
        return prefill_whole, (graphdef, params, state, tokens)
    tokens = _padded_tokens(prompts, lengths, piece.start, piece.size)
    return prefill_padded, (graphdef, params, state, tokens, counts)


def score_piece(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: PrefillState,
    prompts: np.ndarray,
    lengths: np.ndarray,
    piece: Piece,
) -> tuple[PrefillState, Logprobs]:
    """`prefill_piece`, and log-probabilities of the tokens that follow those of the piece."""
    counts = np.clip(lengths - piece.start, 0, piece.count).astype(np.int32)
    tokens, targets = (
        _padded_tokens(prompts, lengths, start, piece.size)
        for start in (piece.start, piece.start + 1)
    )
    return prefill_scored(graphdef, params, state, tokens, counts, targets)


def _padded_tokens(prompts: np.ndarray, lengths: np.ndarray, start: int, size: int) -> np.ndarray:
    """`size` columns of the prompts from `start`; 0 where a prompt has no token."""
    tokens = prompts[:, start : start + size]
    tokens = np.pad(tokens, ((0, 0), (0, size - tokens.shape[1])))
    return np.where(np.arange(start, start + size) < lengths[:, None], tokens, 0)
