"""Text generation in one call: continue prompts of token ids or texts.

`inference.engine.Engine` runs them; use it directly for requests that come and go.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import FinishReason, Request, Stream, TokenLogprobs
from megalodon_jax.inference.sampling import SamplingParams
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.model import Megalodon
from megalodon_jax.modules.embedding import check_tokens
from megalodon_jax.typing import Array, Int32, PRNGKey

if TYPE_CHECKING:
    from megalodon_jax.data.tokenizer import Tokenizer

# Caches that grow with the context have room for a multiple of these tokens: each size compiles.
_ROOM = 256
_MAX_SLOTS = 64
_DEFAULTS = SamplingParams()


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of a text.

    Attributes:
      text: the new text, without a stop string.
      tokens: its token ids, without the stop id.
      finish_reason: "stop": a stop id or stop string; "length": `max_tokens`; "invalid": the model
        gave NaN scores.
      logprobs: of every token, if `SamplingParams.logprobs` asks for them.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()

    @classmethod
    def of(cls, stream: Stream) -> "Completion":
        """The completion of a stream that has ended."""
        assert stream.finish_reason is not None
        return cls(stream.text, tuple(stream.tokens), stream.finish_reason, tuple(stream.logprobs))


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
    except for the cache of a Transformer, which has room for both. A second call with the same
    model and number of prompts compiles nothing, whatever the sampling settings.

    Args:
      model: the model.
      prompts: token ids, right-padded with any id.
      lengths: tokens of each prompt, at least 1; None: all P.
      max_tokens: maximum number of new tokens.
      temperature: divides the logits; 0: greedy decoding.
      top_k: sample from the k most probable tokens; 0: from all.
      top_p: sample from the smallest set of most probable tokens whose probability reaches p.
      key: sampling key; required unless `temperature` is 0. A row's random numbers depend on the
        key and the row's index.
      stop_token: a row ends after this token; None: rows do not end.
      num_tokens: sample only ids below this (a tokenizer may have fewer ids than the model); None:
        all.

    Returns:
      int32 (B, max_tokens), filled with `stop_token` after a row's end; fewer columns if all rows
      end earlier.

    Raises:
      ValueError: a prompt is empty, a token id is outside the vocabulary, or a sampling setting is
        out of range.
      FloatingPointError: the model gave NaN scores.
    """
    blocks = stream(
        model,
        prompts,
        lengths,
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p),
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
    sampling: SamplingParams = _DEFAULTS,
    key: PRNGKey | None = None,
    stop_token: int | None = None,
    num_tokens: int | None = None,
) -> Iterator[np.ndarray]:
    """Like `generate`, but yields blocks (B, n) of new tokens as they are decoded.

    `sampling` has the settings of a draw; its `max_tokens`, stops and log-probabilities are not
    used.
    """
    prompts, lengths = _checked_prompts(model, prompts, lengths)
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}; must not be negative")
    seeds = _row_seeds(sampling, key, len(prompts))
    if max_tokens == 0 or not len(prompts):
        return
    # A stop token that is never drawn ends no row.
    ends = stop_token is not None and (num_tokens is None or stop_token < num_tokens)
    params = dataclasses.replace(
        sampling,
        max_tokens=max_tokens,
        stop_ids=(stop_token,) if ends else (),
        stop=(),
        logprobs=None,
    )
    engine = Engine(
        model,
        slots=max(2, len(prompts)),
        max_length=max_length(model, int(lengths.max()) + max_tokens),
        max_waiting=len(prompts),
        num_tokens=num_tokens,
        fixed_bucket=True,
        fill_slots_first=True,
    )
    streams = [
        engine.submit(
            Request(prompt=prompt[:length], params=dataclasses.replace(params, seed=seed))
        )
        for prompt, length, seed in zip(prompts, lengths, seeds, strict=True)
    ]
    yield from _blocks(engine, streams, stop_token)


def stream_text(
    model: LanguageModel,
    tokenizer: "Tokenizer",
    prompt: str,
    *,
    max_tokens: int,
    sampling: SamplingParams = _DEFAULTS,
    key: PRNGKey | None = None,
) -> Iterator[str]:
    """Continues a text; yields new text as it is decoded.

    It ends at the tokenizer's `eos_id`, a stop of `sampling`, or after `max_tokens` tokens.
    """
    (seed,) = _row_seeds(sampling, key, 1)
    if max_tokens == 0:
        return
    params = dataclasses.replace(sampling, max_tokens=max_tokens, seed=seed)
    request = text_request(tokenizer, prompt, params)
    room = max_length(model, len(request.prompt) + max_tokens)
    engine = Engine(model, slots=2, tokenizer=tokenizer, max_length=room)
    answer = engine.submit(request)
    yield from answer.iterate_text()
    _check_scores([answer])


def generate_text(
    model: LanguageModel,
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    params: SamplingParams = _DEFAULTS,
    *,
    n: int = 1,
) -> list[Completion]:
    """Continues texts: `generate_text(model, tokenizer, ["def "])[0].text`.

    Args:
      model: the model.
      tokenizer: the model's tokenizer; a completion ends at its `eos_id`.
      prompts: any number of texts.
      params: sampling, stops and the number of tokens. Without a seed the samples draw with the
        seeds 0, 1, 2, ...; with one, sample i of every prompt draws with seed + i.
      n: samples of each prompt.

    Returns:
      n completions of the first prompt, n of the second one, and so on.

    Raises:
      RequestError: the parameters do not fit the model.
    """
    requests = [text_request(tokenizer, prompt, params) for prompt in prompts]
    if not requests:
        return []
    longest = max(len(request.prompt) for request in requests)
    engine = Engine(
        model,
        slots=max(2, n, min(n * len(requests), _MAX_SLOTS)),
        tokenizer=tokenizer,
        max_length=max_length(model, longest + params.max_tokens),
        max_waiting=len(requests),
        fixed_bucket=True,
        fill_slots_first=True,
    )
    samples = [engine.submit_samples(request, n) for request in requests]
    engine.run()
    return [Completion.of(each) for each in itertools.chain.from_iterable(samples)]


def text_request(tokenizer: "Tokenizer", prompt: str, params: SamplingParams) -> Request:
    """The request of a text that begins a document and ends at the tokenizer's `eos_id`."""
    tokens = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]).astype(np.int32)
    if tokenizer.eos_id not in params.stop_ids:
        stop_ids = (*params.stop_ids, tokenizer.eos_id)
        params = dataclasses.replace(params, stop_ids=stop_ids)
    return Request(prompt=tokens, params=params)


def _blocks(
    engine: Engine, streams: Sequence[Stream], stop_token: int | None
) -> Iterator[np.ndarray]:
    """Blocks of the tokens that every row has, as they come."""
    start = 0
    while True:
        running = [len(each.tokens) for each in streams if not each.is_finished]
        stop = min(running) if running else max(map(_num_drawn, streams))
        _check_scores(streams)
        if stop > start:
            fill = 0 if stop_token is None else stop_token
            rows = [each.tokens[start:stop] for each in streams]
            rows = [row + [fill] * (stop - start - len(row)) for row in rows]
            yield np.array(rows, np.int32)
            start = stop
        if not running:
            return
        engine.step()


def _num_drawn(stream: Stream) -> int:
    return len(stream.tokens) + (stream.finish_reason == "stop")


def _check_scores(streams: Sequence[Stream]) -> None:
    for row, each in enumerate(streams):
        if each.finish_reason == "invalid":
            raise FloatingPointError(
                f"the model's scores of row {row} are NaN after {len(each.tokens)} new tokens; "
                "check the weights"
            )


def _row_seeds(sampling: SamplingParams, key: PRNGKey | None, rows: int) -> list[int]:
    """A seed for every row; the first ones do not depend on the number of rows."""
    if key is not None:
        words = np.asarray(jax.random.key_data(key)).tolist()
        return np.random.SeedSequence(words).generate_state(rows, np.uint64).tolist()
    if sampling.seed is not None:
        return [(sampling.seed + row) % 2**64 for row in range(rows)]
    if sampling.temperature != 0.0:
        raise ValueError(
            f"sampling at temperature {sampling.temperature} needs a key; pass "
            "key=jax.random.key(seed), or temperature 0"
        )
    return [0] * rows


def max_length(model: LanguageModel, tokens: int) -> int | None:
    """Room for the tokens of a row; MEGALODON's cache has a constant size."""
    return None if isinstance(model, Megalodon) else -(-tokens // _ROOM) * _ROOM


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
