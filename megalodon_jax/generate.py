"""Text from a model: prefill the prompt in pieces, then decode token by token with the cache."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from megalodon_jax.cache import Cache
from megalodon_jax.model import Megalodon
from megalodon_jax.modules.embedding import check_tokens
from megalodon_jax.typing import Array, Bool, Float32, Int32, PRNGKey

if TYPE_CHECKING:
    from megalodon_jax.data.tokenizer import Tokenizer

DECODE_BLOCK = 32
"""Tokens decoded between two looks at the result from the host."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the scores.

    The limits apply in this order: temperature, then `top_k`, then `top_p` of what is left.
    """

    temperature: float = 1.0
    """Divides the scores; 0 always takes the most probable token."""
    top_k: int = 0
    """Draw only from this many most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Draw only from the smallest set of most probable tokens whose probability reaches this."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; must be 0 or more, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; use 0 for no limit, or 1 and more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; must be in (0, 1]")


def keep_top_k(logits: Float32[Array, "B V"], k: int) -> Float32[Array, "B V"]:
    """Scores with all but the k highest set to -inf; of equal scores the lower ids stay.

    Exactly k stay, so that k = 1 is the greedy choice even where scores are equal.
    """
    if k >= logits.shape[-1]:
        return logits
    _, kept = jax.lax.top_k(logits, k)
    rows = jnp.arange(logits.shape[0])[:, None]
    mask = jnp.zeros(logits.shape, bool).at[rows, kept].set(True)
    return jnp.where(mask, logits, -jnp.inf)


def keep_top_p(logits: Float32[Array, "B V"], p: float) -> Float32[Array, "B V"]:
    """Scores outside the smallest set of most probable tokens that reaches probability p, at -inf.

    Nucleus sampling (Holtzman et al. 2019). At least one token stays; of equal scores the lower ids
    come first.
    """
    if p >= 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    # The set is complete once the tokens before have reached p.
    kept = (before < p).at[:, 0].set(True)
    mask = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(mask, logits, -jnp.inf)


def draw(
    logits: Float32[Array, "B V"], key: PRNGKey, sampling: Sampling = Sampling()
) -> Int32[Array, " B"]:
    """One token id for every row of scores."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    logits = keep_top_p(logits, sampling.top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


class _Decoding(NamedTuple):
    cache: Cache
    logits: Float32[Array, "B V"]
    done: Bool[Array, " B"]
    count: Int32[Array, ""]


class _Rules(NamedTuple):
    sampling: Sampling
    stop_token: int | None
    num_tokens: int | None


def generate(
    model: Megalodon,
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

    Memory does not depend on the length of the prompts nor on `max_tokens`: prompts go through the
    cache in pieces.

    Args:
      model: the model.
      prompts: token ids, padded on the right with any id.
      lengths: tokens of each prompt, 1 or more; None: all P.
      max_tokens: most tokens to add.
      temperature: divides the scores; 0 always takes the most probable token.
      top_k: draw only from this many most probable tokens; 0: from all.
      top_p: draw only from the smallest set of most probable tokens that reaches this probability.
      key: randomness of the draws; needed unless `temperature` is 0.
      stop_token: a row ends after this token; None: never.
      num_tokens: only ids below this are drawn (a tokenizer may know fewer than the model); None:
        all.

    Returns:
      int32 (B, max_tokens), filled with `stop_token` after a row's end; fewer columns if every row
      has ended.

    Raises:
      ValueError: a prompt is empty, a token id is outside the vocabulary, or a limit is.
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
    model: Megalodon,
    prompts: Int32[Array, "B P"] | np.ndarray,
    lengths: Int32[Array, " B"] | np.ndarray | None = None,
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    key: PRNGKey | None = None,
    stop_token: int | None = None,
    num_tokens: int | None = None,
) -> Iterator[np.ndarray]:
    """Like `generate`, but yields (B, n) as soon as n more tokens of every row are known."""
    if key is None:
        if sampling.temperature != 0.0:
            raise ValueError(
                f"drawing at temperature {sampling.temperature} needs a key; pass "
                "key=jax.random.key(seed), or temperature 0"
            )
        key = jax.random.key(0)
    prompts, lengths = _checked_prompts(model, prompts, lengths)
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}; must not be negative")
    rules = _Rules(sampling, stop_token, num_tokens)
    graphdef, params = nnx.split(model)
    decoding = _prefill(graphdef, params, prompts, lengths)
    decoding.cache.check_room(max_tokens)
    for start in range(0, max_tokens, DECODE_BLOCK):
        decoding, tokens = _decode_block(graphdef, params, decoding, key, rules)
        yield np.asarray(tokens)[:, : max_tokens - start]
        if stop_token is not None and bool(jnp.all(decoding.done)):
            return


def stream_text(
    model: Megalodon,
    tokenizer: "Tokenizer",
    prompt: str,
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    key: PRNGKey | None = None,
) -> Iterator[str]:
    """Continues a text; yields pieces of new text, ends early where the model ends the document."""
    tokens = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]).astype(np.int32)
    known: list[int] = []
    shown = ""
    for block in stream(
        model, tokens[None], max_tokens=max_tokens, sampling=sampling, key=key,
        stop_token=tokenizer.eos_id, num_tokens=tokenizer.vocab_size,
    ):  # fmt: skip
        new = block[0].tolist()
        ended = tokenizer.eos_id in new
        known += new[: new.index(tokenizer.eos_id)] if ended else new
        text = tokenizer.decode(np.asarray(known, np.int32))
        # A character may be cut at the block's end; it decodes to U+FFFD until its rest arrives.
        complete = text if ended else text.rstrip("\ufffd")
        if complete.startswith(shown) and len(complete) > len(shown):
            yield complete[len(shown) :]
            shown = complete
        if ended:
            return
    text = tokenizer.decode(np.asarray(known, np.int32))
    if len(text) > len(shown):
        yield text[len(shown) :]


def _checked_prompts(
    model: Megalodon, prompts: Array | np.ndarray, lengths: Array | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    prompts = np.asarray(prompts, np.int32)
    if prompts.ndim != 2:
        raise ValueError(f"prompts have shape {prompts.shape}; need (batch, length)")
    B, P = prompts.shape
    lengths = np.full(B, P, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    if lengths.shape != (B,):
        raise ValueError(f"lengths have shape {lengths.shape}; need ({B},), one for each prompt")
    if B and (lengths.min() < 1 or lengths.max() > P):
        raise ValueError(
            f"prompt lengths run from {lengths.min()} to {lengths.max()}; need 1 to {P} "
            "(start an empty prompt with the tokenizer's document mark)"
        )
    # Ids after a prompt's end are never looked at, so they need not be valid.
    prompts = np.where(np.arange(P) < lengths[:, None], prompts, 0)
    check_tokens(prompts, model.config.vocab_size)
    return prompts, lengths


def _prefill(
    graphdef: nnx.GraphDef, params: nnx.State, prompts: np.ndarray, lengths: np.ndarray
) -> _Decoding:
    model = nnx.merge(graphdef, params)
    config = model.config
    B, P = prompts.shape
    # Powers of two, so that a few compiled sizes serve all short prompts.
    piece = min(config.chunk_size, 1 << max(P - 1, 15).bit_length())
    padded = np.pad(prompts, ((0, 0), (0, -P % piece)))
    cache = fresh_cache(graphdef, params, B)
    last = jnp.zeros((B, config.num_outputs), jnp.float32)
    for start in range(0, P, piece):
        left = jnp.asarray(lengths - start)
        tokens = padded[:, start : start + piece]
        cache, last = _prefill_piece(graphdef, params, cache, tokens, left, last)
    return _Decoding(cache, last, jnp.zeros(B, bool), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnums=(0, 2))
def fresh_cache(graphdef: nnx.GraphDef, params: nnx.State, batch_size: int) -> Cache:
    """`Megalodon.init_cache`, jitted: every array has memory of its own, so all may be donated."""
    model: Megalodon = nnx.merge(graphdef, params)
    return model.init_cache(batch_size)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill_piece(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    cache: Cache,
    tokens: Int32[Array, "B L"],
    left: Int32[Array, " B"],
    last_logits: Float32[Array, "B V"],
) -> tuple[Cache, Float32[Array, "B V"]]:
    """Feeds a piece; keeps the scores after each prompt's last token if it is in this piece."""
    model: Megalodon = nnx.merge(graphdef, params)
    L = tokens.shape[1]
    segment_ids = (jnp.arange(L) < left[:, None]).astype(jnp.int32)
    hidden, new_cache = model.hidden(tokens, segment_ids=segment_ids, cache=cache)
    at = jnp.clip(left - 1, 0, L - 1)
    ends = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
    ends_here = (left >= 1) & (left <= L)
    assert new_cache is not None
    return new_cache, jnp.where(ends_here[:, None], model.logits(ends), last_logits)


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _decode_block(
    graphdef: nnx.GraphDef, params: nnx.State, decoding: _Decoding, key: PRNGKey, rules: _Rules
) -> tuple[_Decoding, Int32[Array, "B n"]]:
    model: Megalodon = nnx.merge(graphdef, params)
    sampling, stop_token, num_tokens = rules

    def one(decoding: _Decoding, _) -> tuple[_Decoding, Int32[Array, " B"]]:
        cache, logits, done, count = decoding
        if num_tokens is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)
        token = draw(logits, jax.random.fold_in(key, count), sampling)
        if stop_token is not None:
            token = jnp.where(done, stop_token, token)
            done = done | (token == stop_token)
        logits, cache = model(token[:, None], cache=cache)
        assert cache is not None
        return _Decoding(cache, logits[:, 0], done, count + 1), token

    decoding, tokens = jax.lax.scan(one, decoding, length=DECODE_BLOCK)
    return decoding, tokens.T
