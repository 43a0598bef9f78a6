"""Text generation: prefill of the prompt in pieces, then token-by-token decoding."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from megalodon_jax.language_model import LanguageModel, StreamingCache
from megalodon_jax.modules.embedding import check_tokens
from megalodon_jax.typing import Array, Bool, Float32, Int32, PRNGKey

if TYPE_CHECKING:
    from megalodon_jax.data.tokenizer import Tokenizer

DECODE_BLOCK = 32
"""Tokens decoded on the device per call; the host reads the result after each block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is sampled: temperature, then top-k, then top-p of what top-k leaves."""

    temperature: float = 1.0
    """Divides the logits; 0: greedy decoding."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens whose probability reaches p."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; use a finite value of 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; use 1 or more, or 0 for no limit")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; use a value in (0, 1]")


def top_k_filter(logits: Float32[Array, "B V"], k: int) -> Float32[Array, "B V"]:
    """Sets all but the k largest logits to -inf; ties prefer lower ids.

    Exactly k remain, so that k = 1 is greedy decoding even with ties.
    """
    if k >= logits.shape[-1]:
        return logits
    _, top = jax.lax.top_k(logits, k)
    rows = jnp.arange(logits.shape[0])[:, None]
    mask = jnp.zeros(logits.shape, bool).at[rows, top].set(True)
    return jnp.where(mask, logits, -jnp.inf)


def top_p_filter(logits: Float32[Array, "B V"], p: float) -> Float32[Array, "B V"]:
    """Sets the logits outside the nucleus to -inf (Holtzman et al. 2019).

    The nucleus is the smallest set of most probable tokens whose probability reaches p. It has at
    least one token; ties prefer lower ids.
    """
    if p >= 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    # A token is outside if the more probable ones already reach p.
    in_nucleus = (before < p).at[:, 0].set(True)
    mask = jnp.take_along_axis(in_nucleus, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(mask, logits, -jnp.inf)


def sample(
    logits: Float32[Array, "B V"], key: PRNGKey, sampling: Sampling = Sampling()
) -> Int32[Array, " B"]:
    """Samples one token id per row."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k:
        logits = top_k_filter(logits, sampling.top_k)
    logits = top_p_filter(logits, sampling.top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


class DecodeState(NamedTuple):
    """The state between two decoding steps.

    Attributes:
      cache: the model's cache.
      logits: of the next token.
      done: rows that have sampled the stop token.
      count: tokens sampled so far.
    """

    cache: StreamingCache
    logits: Float32[Array, "B V"]
    done: Bool[Array, " B"]
    count: Int32[Array, ""]


class SamplingRules(NamedTuple):
    """The static settings of a decoding step; see `generate`."""

    sampling: Sampling
    stop_token: int | None
    num_tokens: int | None


def generate(
    model: LanguageModel,
    prompts: Int32[Array, "B P"] | np.ndarray,
    lengths: Int32[Array, " B"] | np.ndarray | None = None,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: PRNGKey | None = None,
    stop_token: int | None = None,
    num_tokens: int | None = None,
) -> np.ndarray:
    """Continues every prompt of a batch by up to `max_tokens` tokens.

    Prompts are prefilled in pieces. Device memory is independent of prompt length and `max_tokens`,
    except for the cache of a Transformer, which has room for both.

    Args:
      model: the model.
      prompts: token ids, right-padded with any id.
      lengths: tokens of each prompt, at least 1; None: all P.
      max_tokens: maximum number of new tokens.
      temperature: divides the logits; 0: greedy decoding.
      top_k: sample from the k most probable tokens; 0: from all.
      top_p: sample from the smallest set of most probable tokens whose probability reaches p.
      key: sampling key; required unless `temperature` is 0.
      stop_token: a row ends after this token; None: rows do not end.
      num_tokens: sample only ids below this (a tokenizer may have fewer ids than the model); None:
        all.

    Returns:
      int32 (B, max_tokens), filled with `stop_token` after a row's end; fewer columns if all rows
      end earlier.

    Raises:
      ValueError: a prompt is empty, a token id is outside the vocabulary, or a sampling setting is
        out of range.
    """
    blocks = stream(
        model,
        prompts,
        lengths,
        max_tokens=max_tokens,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
        key=key,
        stop_token=stop_token,
        num_tokens=num_tokens,
    )
    empty = np.zeros((np.shape(prompts)[0], 0), np.int32)
    return np.concatenate([empty, *blocks], axis=1)


def stream(
    model: LanguageModel,
    prompts: Int32[Array, "B P"] | np.ndarray,
    lengths: Int32[Array, " B"] | np.ndarray | None = None,
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    key: PRNGKey | None = None,
    stop_token: int | None = None,
    num_tokens: int | None = None,
) -> Iterator[np.ndarray]:
    """Like `generate`, but yields blocks (B, n) of new tokens as they are decoded."""
    if key is None:
        if sampling.temperature != 0.0:
            raise ValueError(
                f"sampling at temperature {sampling.temperature} needs a key; pass "
                "key=jax.random.key(seed), or temperature 0"
            )
        key = jax.random.key(0)
    prompts, lengths = _checked_prompts(model, prompts, lengths)
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}; must not be negative")
    rules = SamplingRules(sampling, stop_token, num_tokens)
    graphdef, params = nnx.split(model)
    blocks = math.ceil(max_tokens / DECODE_BLOCK)
    max_length = prompts.shape[1] + blocks * DECODE_BLOCK
    state = _prefill(graphdef, params, prompts, lengths, max_length)
    state.cache.check_room(max_tokens)
    for start in range(0, max_tokens, DECODE_BLOCK):
        state, tokens = _decode_block(graphdef, params, state, key, rules)
        yield np.asarray(tokens)[:, : max_tokens - start]
        if stop_token is not None and bool(jnp.all(state.done)):
            return


def stream_text(
    model: LanguageModel,
    tokenizer: "Tokenizer",
    prompt: str,
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    key: PRNGKey | None = None,
) -> Iterator[str]:
    """Continues a text; yields new text as it is decoded and ends at the tokenizer's `eos_id`."""
    tokens = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]).astype(np.int32)
    generated: list[int] = []
    yielded = ""
    for block in stream(
        model, tokens[None], max_tokens=max_tokens, sampling=sampling, key=key,
        stop_token=tokenizer.eos_id, num_tokens=tokenizer.vocab_size,
    ):  # fmt: skip
        new = block[0].tolist()
        ended = tokenizer.eos_id in new
        generated += new[: new.index(tokenizer.eos_id)] if ended else new
        text = tokenizer.decode(np.asarray(generated, np.int32))
        # A character whose bytes are split between blocks decodes to U+FFFD until it is complete.
        complete = text if ended else text.rstrip("\ufffd")
        if complete.startswith(yielded) and len(complete) > len(yielded):
            yield complete[len(yielded) :]
            yielded = complete
        if ended:
            return
    text = tokenizer.decode(np.asarray(generated, np.int32))
    if len(text) > len(yielded):
        yield text[len(yielded) :]


def _checked_prompts(
    model: LanguageModel, prompts: Array | np.ndarray, lengths: Array | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    prompts = np.asarray(prompts, np.int32)
    if prompts.ndim != 2:
        raise ValueError(f"prompts have shape {prompts.shape}; pass (batch, length)")
    B, P = prompts.shape
    lengths = np.full(B, P, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    if lengths.shape != (B,):
        raise ValueError(f"lengths have shape {lengths.shape}; pass ({B},), one per prompt")
    if B and (lengths.min() < 1 or lengths.max() > P):
        raise ValueError(
            f"prompt lengths range from {lengths.min()} to {lengths.max()}; use 1 to {P} (an empty "
            "prompt starts with the tokenizer's bos_id)"
        )
    # Padding may hold any id, also one outside the vocabulary.
    prompts = np.where(np.arange(P) < lengths[:, None], prompts, 0)
    check_tokens(prompts, model.config.vocab_size)
    return prompts, lengths


def _prefill(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    prompts: np.ndarray,
    lengths: np.ndarray,
    max_length: int,
) -> DecodeState:
    model: LanguageModel = nnx.merge(graphdef, params)
    B, P = prompts.shape
    # Powers of two limit the number of compiled shapes for short prompts.
    piece_length = min(model.piece_length, 1 << max(P - 1, 15).bit_length())
    padded = np.pad(prompts, ((0, 0), (0, -P % piece_length)))
    cache = init_cache(graphdef, params, B, max_length)
    last_logits = jnp.zeros((B, model.config.num_outputs), jnp.float32)
    for start in range(0, P, piece_length):
        remaining = jnp.asarray(lengths - start)
        tokens = padded[:, start : start + piece_length]
        cache, last_logits = _prefill_piece(graphdef, params, cache, tokens, remaining, last_logits)
    return DecodeState(cache, last_logits, jnp.zeros(B, bool), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnums=(0, 2, 3))
def init_cache(
    graphdef: nnx.GraphDef, params: nnx.State, batch_size: int, max_length: int
) -> StreamingCache:
    """`LanguageModel.init_cache`, jitted: no two arrays share a buffer, so it can be donated."""
    model: LanguageModel = nnx.merge(graphdef, params)
    return model.init_cache(batch_size, max_length=max_length)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill_piece(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    cache: StreamingCache,
    tokens: Int32[Array, "B L"],
    remaining: Int32[Array, " B"],
    last_logits: Float32[Array, "B V"],
) -> tuple[StreamingCache, Float32[Array, "B V"]]:
    """Prefills one piece; updates the last logits of the prompts that end in it."""
    model: LanguageModel = nnx.merge(graphdef, params)
    L = tokens.shape[1]
    segment_ids = (jnp.arange(L) < remaining[:, None]).astype(jnp.int32)
    hidden, new_cache = model.hidden(tokens, segment_ids=segment_ids, cache=cache)
    last_column = jnp.clip(remaining - 1, 0, L - 1)
    last_hidden = jnp.take_along_axis(hidden, last_column[:, None, None], axis=1)[:, 0]
    ends_here = (remaining >= 1) & (remaining <= L)
    assert new_cache is not None
    return new_cache, jnp.where(ends_here[:, None], model.logits(last_hidden), last_logits)


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _decode_block(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: DecodeState,
    key: PRNGKey,
    rules: SamplingRules,
) -> tuple[DecodeState, Int32[Array, "B n"]]:
    model: LanguageModel = nnx.merge(graphdef, params)
    sampling, stop_token, num_tokens = rules

    def decode_token(state: DecodeState, _) -> tuple[DecodeState, Int32[Array, " B"]]:
        cache, logits, done, count = state
        if num_tokens is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)
        token = sample(logits, jax.random.fold_in(key, count), sampling)
        if stop_token is not None:
            token = jnp.where(done, stop_token, token)
            done = done | (token == stop_token)
        logits, cache = model(token[:, None], cache=cache)
        assert cache is not None
        return DecodeState(cache, logits[:, 0], done, count + 1), token

    state, tokens = jax.lax.scan(decode_token, state, length=DECODE_BLOCK)
    return state, tokens.T
