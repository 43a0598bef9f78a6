"""Sampling of the next token of every row, with parameters that are arrays.

No value of a parameter is static: `draw` compiles once per `Features`. The random numbers of a draw
depend on the row's seed and on the number of tokens that the row has drawn, not on its slot, its
neighbours or the batch size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt32

from megalodon_jax.inference.filters import filter_mask
from megalodon_jax.inference.sampling_params import MAX_LOGPROBS, Features, SamplingParams
from megalodon_jax.typing import Array, Bool, Float32, Int32

__all__ = [
    "MAX_LOGPROBS", "Drawn", "DrawnPositions", "Features", "Logprobs", "SamplingParams",
    "SamplingState", "advance", "check_sampling", "draw", "draw_positions", "empty_state",
    "fill_row", "sampling_row", "token_logprobs",
]  # fmt: skip

_MASK_BITS = 32


class SamplingState(NamedTuple):
    """Parameters and progress of the sampling of S slots.

    Attributes:
      temperature: divides the logits; 0: greedy.
      top_k: number of tokens; 0: all.
      top_p: share of the probability; 1: all tokens.
      min_p: share of the most probable token's probability; 0: all tokens.
      repetition: penalty of tokens in the prompt or the output; 1: none.
      presence: penalty of tokens in the output.
      frequency: penalty per occurrence in the output.
      bias: added to the logits.
      counts: occurrences of every token in the output, kept where `Features.penalties` is on.
      in_prompt: tokens of the prompt.
      seed: key data of the row, the upper and lower half of its seed.
      position: tokens drawn so far.
      num_tokens: ids from here on are never drawn.
    """

    temperature: Float32[Array, " S"]
    top_k: Int32[Array, " S"]
    top_p: Float32[Array, " S"]
    min_p: Float32[Array, " S"]
    repetition: Float32[Array, " S"]
    presence: Float32[Array, " S"]
    frequency: Float32[Array, " S"]
    bias: Float32[Array, "S V"]
    counts: Int32[Array, "S V"]
    in_prompt: Bool[Array, "S V"]
    seed: UInt32[Array, "S 2"]
    position: Int32[Array, " S"]
    num_tokens: Int32[Array, " S"]


class Logprobs(NamedTuple):
    """Log-probabilities under the model: natural logarithms, before any sampling parameter.

    Only ids below the row's `num_tokens` have a probability.

    Attributes:
      token: of the given token; NaN where log-probabilities are not computed.
      top_ids: the n most probable tokens, the most probable first; ties prefer lower ids.
      top: of `top_ids`.
    """

    token: Float32[Array, "*s"]
    top_ids: Int32[Array, "*s n"]
    top: Float32[Array, "*s n"]


class Drawn(NamedTuple):
    """The next token of every row.

    Attributes:
      tokens: token ids.
      logprobs: their log-probabilities and the most probable tokens.
      valid: False where a logit is NaN or no allowed token has a finite logit. NaN counts as -inf;
        where no token is left, the token is 0.
      state: the state after the draw.
    """

    tokens: Int32[Array, " B"]
    logprobs: Logprobs
    valid: Bool[Array, " B"]
    state: SamplingState


class DrawnPositions(NamedTuple):
    """The tokens of k successive positions, of which the first `accepted` are those of plain draws.

    Attributes:
      tokens: token ids; the last accepted one is not a draft.
      accepted: 1 to k: one more than the number of leading drafts that equal the drawn tokens.
      logprobs: as in `Drawn`, per position.
      valid: as in `Drawn`, per position.
      state: the state after the accepted tokens.
    """

    tokens: Int32[Array, "B k"]
    accepted: Int32[Array, " B"]
    logprobs: Logprobs
    valid: Bool[Array, "B k"]
    state: SamplingState


def sampling_row(
    params: SamplingParams,
    *,
    vocab_size: int,
    num_tokens: int | None = None,
    prompt: Sequence[int] | Int[np.ndarray, " n"] = (),
    seed: int | None = None,
    features: Features | None = None,
) -> SamplingState:
    """The state of one request before its first draw: NumPy arrays without the slot axis.

    Args:
      params: the request's parameters.
      vocab_size: number of logits, V.
      num_tokens: draw only ids below this (a tokenizer may have fewer ids than the model); None:
        all.
      prompt: the prompt's token ids, for the repetition penalty.
      seed: used where `params.seed` is None; 0 to 2^64 - 1.
      features: of the draw that starts the row; rows of V numbers that it does not read, and the
        counts, are then None, for `fill_row`. None: all rows are there.

    Raises:
      ValueError: as `check_sampling`, or a prompt's id is not below `vocab_size`.
    """
    num_tokens = vocab_size if num_tokens is None else num_tokens
    seed = seed if params.seed is None else params.seed
    check_sampling(params, vocab_size, num_tokens, seed)
    bias = in_prompt = None
    if features is None or features.bias:
        bias = np.zeros(vocab_size, np.float32)
        bias[list(params.logit_bias)] = list(params.logit_bias.values())
    if features is None or features.penalties:
        in_prompt = _in_prompt(prompt, vocab_size)
    upper, lower = divmod(seed or 0, 2**32)
    values: dict[str, Any] = {
        "temperature": np.float32(params.temperature),
        "top_k": np.int32(min(params.top_k, vocab_size)),
        "top_p": np.float32(params.top_p),
        "min_p": np.float32(params.min_p),
        "repetition": np.float32(params.repetition_penalty),
        "presence": np.float32(params.presence_penalty),
        "frequency": np.float32(params.frequency_penalty),
        "bias": bias,
        "counts": np.zeros(vocab_size, np.int32) if features is None else None,
        "in_prompt": in_prompt,
        "seed": np.array([upper, lower], np.uint32),
        "position": np.int32(0),
        "num_tokens": np.int32(num_tokens),
    }
    return SamplingState(**values)


def check_sampling(
    params: SamplingParams, vocab_size: int, num_tokens: int, seed: int | None
) -> None:
    """Raises ValueError for parameters that do not fit the vocabulary, or sampling without seed."""
    if not 1 <= num_tokens <= vocab_size:
        raise ValueError(f"num_tokens is {num_tokens}; use 1 to vocab_size {vocab_size}")
    for name, ids in (("logit_bias", params.logit_bias), ("stop_ids", params.stop_ids)):
        if wrong := [token for token in ids if token >= num_tokens]:
            raise ValueError(f"{name} has token {wrong[0]}; use ids below {num_tokens}")
    if seed is None and params.temperature > 0.0:
        raise ValueError(f"sampling at temperature {params.temperature} needs a seed; pass one")


def fill_row(row: SamplingState, *, vocab_size: int) -> SamplingState:
    """A row of `sampling_row` with zeros for None; call it inside `jit`."""
    dtypes = {"bias": jnp.float32, "counts": jnp.int32, "in_prompt": bool}
    missing = [name for name in dtypes if getattr(row, name) is None]
    return row._replace(**{name: jnp.zeros(vocab_size, dtypes[name]) for name in missing})


def _in_prompt(
    prompt: Sequence[int] | Int[np.ndarray, " n"], vocab_size: int
) -> Bool[np.ndarray, " V"]:
    ids = np.asarray(prompt, np.int64)
    if wrong := ids[(ids < 0) | (ids >= vocab_size)].tolist():
        raise ValueError(f"prompt has token {wrong[0]}; use ids below {vocab_size}")
    found = np.zeros(vocab_size, bool)
    found[ids] = True
    return found


def empty_state(slots: int, *, vocab_size: int) -> SamplingState:
    """A state whose slots are greedy, without filters and penalties."""
    row = sampling_row(SamplingParams(temperature=0.0), vocab_size=vocab_size)
    return jax.tree.map(lambda x: jnp.tile(x, (slots, *[1] * np.ndim(x))), row)


def draw(
    logits: Float32[Array, "B V"],
    state: SamplingState,
    features: Features,
    *,
    logits_mask: Int32[Array, "B W"] | None = None,
    active: Bool[Array, " B"] | None = None,
) -> Drawn:
    """Draws the next token of every row (Gumbel-max; ties of greedy rows prefer lower ids).

    Args:
      logits: of the next token, one row per slot of the state; any float type.
      state: parameters and progress.
      features: static; must cover the features of every row whose token is used.
      logits_mask: W = ceil(V / 32) words per row; bit j of word i allows token 32 i + j, as in
        llguidance and XGrammar. -1 allows all 32. None: all tokens are allowed.
      active: rows that advance; the progress of the others is kept. None: all.
    """
    tokens, logprobs, valid = _draw_rows(logits, state, features, logits_mask)
    steps = jnp.ones_like(tokens) if active is None else active.astype(jnp.int32)
    return Drawn(tokens, logprobs, valid, advance(state, tokens[:, None], steps, features))


def draw_positions(
    logits: Float32[Array, "B k V"],
    drafts: Int32[Array, "B k-1"],
    state: SamplingState,
    features: Features,
    *,
    logits_mask: Int32[Array, "B k W"] | None = None,
    active: Bool[Array, " B"] | None = None,
) -> DrawnPositions:
    """Draws k successive tokens of every row, given the logits after its draft tokens.

    Position i uses the random numbers and penalties of the i-th plain draw, and a draft is accepted
    while it equals the drawn token. The accepted tokens are therefore those of `draw`.

    Args:
      logits: `logits[:, i]` follow the draft tokens up to `drafts[:, i - 1]`.
      drafts: proposed tokens; -1 (no token) is never accepted.
      state: parameters and progress before position 0.
      features: as in `draw`.
      logits_mask: as in `draw`, per position.
      active: as in `draw`.
    """
    B, k, V = logits.shape
    rows = jax.tree.map(lambda x: jnp.repeat(x, k, axis=0), state)
    steps = jnp.arange(k)
    position = state.position[:, None] + steps
    rows = rows._replace(position=position.reshape(-1))
    if features.penalties:
        # Drafts of a row that are counted at each of its positions; -1 is dropped.
        counted = jnp.arange(k - 1) < steps[:, None]
        columns = jnp.where(counted & (drafts >= 0)[:, None], drafts[:, None], V)
        counts = jnp.repeat(state.counts, k, axis=0)
        row_index = jnp.arange(B * k)[:, None]
        counts = counts.at[row_index, columns.reshape(B * k, k - 1)].add(1, mode="drop")
        rows = rows._replace(counts=counts)
    mask = None if logits_mask is None else logits_mask.reshape(B * k, -1)
    drawn = _draw_rows(logits.reshape(B * k, V), rows, features, mask)
    tokens, logprobs, valid = jax.tree.map(lambda x: x.reshape(B, k, *x.shape[1:]), drawn)
    equal = (tokens[:, :-1] == drafts).astype(jnp.int32)
    accepted = 1 + jnp.sum(jnp.cumprod(equal, axis=1), axis=1, dtype=jnp.int32)
    advanced = accepted if active is None else jnp.where(active, accepted, 0)
    state = advance(state, tokens, advanced, features)
    return DrawnPositions(tokens, accepted, logprobs, valid, state)


def token_logprobs(
    logits: Float32[Array, "*s V"],
    tokens: Int32[Array, "*s"],
    n: int,
    *,
    num_tokens: Int32[Array, "*s"] | int | None = None,
) -> Logprobs:
    """Log-probabilities of given tokens, such as a prompt's, and of the n most probable ones.

    Args:
      logits: of these tokens.
      tokens: token ids.
      n: static; 0 to V.
      num_tokens: only ids below this have a probability; None: all.
    """
    V = logits.shape[-1]
    logits = jnp.asarray(logits, jnp.float32)
    if num_tokens is not None:
        allowed = jnp.arange(V) < jnp.asarray(num_tokens)[..., None]
        logits = jnp.where(allowed, logits, -jnp.inf)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top, top_ids = jax.lax.top_k(logits, n)
    token = jnp.take_along_axis(logits, tokens[..., None], axis=-1) - total
    return Logprobs(token[..., 0], top_ids.astype(jnp.int32), top - total)


def _draw_rows(
    logits: Float32[Array, "B V"],
    rows: SamplingState,
    features: Features,
    logits_mask: Int32[Array, "B W"] | None,
) -> tuple[Int32[Array, " B"], Logprobs, Bool[Array, " B"]]:
    logits = jnp.asarray(logits, jnp.float32)
    scores, valid = _scores(logits, rows, features, logits_mask)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if features.logprobs is None:
        B = tokens.shape[0]
        nothing = jnp.zeros((B, 0), jnp.int32), jnp.zeros((B, 0), jnp.float32)
        logprobs = Logprobs(jnp.full(B, jnp.nan, jnp.float32), *nothing)
    else:
        logprobs = token_logprobs(logits, tokens, features.logprobs, num_tokens=rows.num_tokens)
    return tokens, logprobs, valid


def _scores(
    logits: Float32[Array, "B V"],
    rows: SamplingState,
    features: Features,
    logits_mask: Int32[Array, "B W"] | None,
) -> tuple[Float32[Array, "B V"], Bool[Array, " B"]]:
    """Scores whose largest is the draw, with the same bits in every program; validity."""
    x, valid = _penalized(logits, rows, features, logits_mask)
    if features.random:
        x = jnp.where((rows.temperature > 0.0)[:, None], _noisy(x, rows, features), x)
    return x, valid


def _penalized(
    logits: Float32[Array, "B V"],
    rows: SamplingState,
    features: Features,
    logits_mask: Int32[Array, "B W"] | None,
) -> tuple[Float32[Array, "B V"], Bool[Array, " B"]]:
    """Logits of the distribution at temperature 1, -inf where a token is not allowed; validity."""
    V = logits.shape[-1]
    allowed = jnp.arange(V) < rows.num_tokens[:, None]
    if logits_mask is not None:
        allowed &= _unpacked(logits_mask, V)
    has_nan = jnp.any(jnp.isnan(logits) & allowed, axis=-1)
    x = jnp.where(allowed & ~jnp.isnan(logits), logits, -jnp.inf)
    if features.bias:
        x = x + rows.bias
    if features.penalties:
        # Keskar et al. 2019 (CTRL), as Hugging Face and vLLM have it.
        seen = rows.in_prompt | (rows.counts > 0)
        repetition = jnp.where(seen, rows.repetition[:, None], 1.0)
        x = _rounded(jnp.where(x > 0.0, x / repetition, x * repetition), rows)
        x = x - _rounded(rows.frequency[:, None] * rows.counts, rows)
        x = x - jnp.where(rows.counts > 0, rows.presence[:, None], 0.0)
    # The difference of two infinite logits would be NaN.
    x = jnp.minimum(x, jnp.finfo(jnp.float32).max)
    return x, ~has_nan & jnp.any(x > -jnp.inf, axis=-1)


def _unpacked(logits_mask: Int32[Array, "B W"], vocab_size: int) -> Bool[Array, "B V"]:
    words = -(-vocab_size // _MASK_BITS)
    if logits_mask.shape[-1] != words:
        raise ValueError(
            f"logits_mask has {logits_mask.shape[-1]} words a row; a vocabulary of {vocab_size} "
            f"needs {words}"
        )
    bits = (logits_mask[..., None] >> jnp.arange(_MASK_BITS)) & 1
    return bits.reshape(len(logits_mask), -1)[:, :vocab_size].astype(bool)


def _noisy(
    x: Float32[Array, "B V"], rows: SamplingState, features: Features
) -> Float32[Array, "B V"]:
    """Filtered logits at the row's temperature plus Gumbel noise: the largest is the draw."""
    temperature = jnp.where(rows.temperature > 0.0, rows.temperature, 1.0)[:, None]
    largest = jnp.max(x, axis=-1, keepdims=True)
    # Relative to the largest, so that a small temperature does not overflow.
    scaled = (x - jnp.where(jnp.isfinite(largest), largest, 0.0)) / temperature
    scaled = _rounded(scaled, rows)
    kept = None
    if features.top_k or features.top_p:
        kept = filter_mask(
            x,
            k=rows.top_k if features.top_k else None,
            p=rows.top_p if features.top_p else None,
            weights=jnp.exp(scaled),
        )
    if features.min_p:
        probable = (scaled >= jnp.log(rows.min_p)[:, None]) | (rows.min_p == 0.0)[:, None]
        kept = probable if kept is None else kept & probable
    noisy = scaled + _rounded(_gumbel(rows, x.shape[-1]), rows)
    return noisy if kept is None else jnp.where(kept, noisy, -jnp.inf)


def _rounded(x: Float32[Array, "B V"], rows: SamplingState) -> Float32[Array, "B V"]:
    """The same values, rounded to float32 in every program.

    Compilers merge a product, also one by a reciprocal, with an addition that uses it and skip its
    rounding, in one program and not in the next. The sign of a position is 0, which they do not
    know.
    """
    zero = (rows.position >> 31)[:, None]
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) ^ zero
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _gumbel(rows: SamplingState, vocab_size: int) -> Float32[Array, "B V"]:
    """Standard Gumbel noise, -log E with E exponential, from the row's seed and position."""
    keys = jax.vmap(jax.random.fold_in)(
        jax.random.wrap_key_data(rows.seed, impl="threefry2x32"), rows.position
    )
    bits = jax.vmap(lambda key: jax.random.bits(key, (vocab_size,), jnp.uint32))(keys)
    # The largest noise decides: all 32 bits, where u is small, keep its upper tail fine.
    u = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, 1.0 - 2.0**-24)))


def advance(
    state: SamplingState,
    tokens: Int32[Array, "B k"],
    steps: Int32[Array, " B"],
    features: Features,
) -> SamplingState:
    """The state after the first `steps` of each row's tokens; `draw` has done it for its own."""
    state = state._replace(position=state.position + steps)
    if not features.penalties:
        return state
    V = state.counts.shape[-1]
    columns = jnp.where(jnp.arange(tokens.shape[1]) < steps[:, None], tokens, V)
    rows = jnp.arange(len(tokens))[:, None]
    return state._replace(counts=state.counts.at[rows, columns].add(1, mode="drop"))
