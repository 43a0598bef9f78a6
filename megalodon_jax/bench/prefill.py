"""Speed of prefill by length, and the time from a request to its first token."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from megalodon_jax.bench.decode_steps import GREEDY, BenchModel, random_ids
from megalodon_jax.bench.decode_timeline import Timeline, trace_first_token
from megalodon_jax.config import ModelConfig
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.prefill import empty_prefill_state
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling import SamplingParams
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.typing import Array, Float, Int32

# Enough tokens for a full block behind the first one, as in a long answer.
_ANSWER = 64
# Tokens after a prompt's known beginning.
_TAIL = 16


class PrefillSpeed(NamedTuple):
    """Prefill of one row, and the model without a cache on the same tokens.

    Attributes:
      length: tokens of the prompt.
      seconds: of the prefill, piece by piece.
      whole_seconds: of `model.hidden` on the whole row; None if it did not fit.
      reason: why it did not.
    """

    length: int
    seconds: float
    whole_seconds: float | None
    reason: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Rate of the prefill."""
        return self.length / self.seconds

    @property
    def ratio(self) -> float | None:
        """Speed of the prefill over that of `model.hidden`."""
        return None if self.whole_seconds is None else self.whole_seconds / self.seconds


class FirstToken(NamedTuple):
    """Seconds from `Engine.submit` to the first token id on the host.

    Attributes:
      prompt: tokens of the prompt.
      known: of these, tokens whose state the engine's prefix cache has.
      seconds: median.
      timeline: of one more request, if it is traced.
    """

    prompt: int
    known: int
    seconds: float
    timeline: Timeline | None = None


def prefill_speed(model: BenchModel, length: int, *, repeats: int) -> PrefillSpeed:
    """Measures the prefill of one row of random ids; medians after one call for warm-up.

    Args:
      model: the model.
      length: tokens of the prompt.
      repeats: timed calls.
    """
    tokens = random_ids(np.random.default_rng(length), length, model.model.config.vocab_size)

    def prepare() -> Any:
        return empty_prefill_state(model.graphdef, model.params, 1)

    seconds = median_seconds(lambda state: model.prefill_from(state, tokens), prepare, repeats)
    whole, reason = None, None
    try:
        whole = median_seconds(
            lambda row: _hidden(model.graphdef, model.params, row),
            lambda: jax.device_put(tokens[None]),
            repeats,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
    return PrefillSpeed(length, seconds, whole, reason)


def median_seconds(
    function: Callable[[Any], Any], prepare: Callable[[], Any], repeats: int
) -> float:
    """Seconds of `function(prepare())` until its result is there; the argument is not timed."""
    seconds = []
    for _ in range(repeats + 1):
        argument = jax.block_until_ready(prepare())
        started = time.perf_counter()
        jax.block_until_ready(function(argument))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def first_tokens(
    model: BenchModel, prompt: int, *, repeats: int, profile: bool = False
) -> list[FirstToken]:
    """Times to the first token through an idle engine: a cold prompt, and a known beginning.

    Programs are compiled by two requests of each kind before. The known beginning is one chunk,
    followed by 16 tokens.

    Args:
      model: a MEGALODON.
      prompt: tokens of the cold prompt.
      repeats: timed requests.
      profile: also trace one request of each kind.
    """
    rng = np.random.default_rng(0)
    config = model.model.config
    assert isinstance(config, ModelConfig)
    vocab_size = config.vocab_size
    engine = Engine(model.model, slots=2)

    def unknown() -> np.ndarray:
        return random_ids(rng, prompt, vocab_size)

    def trace(next_prompt: Callable[[], np.ndarray]) -> Timeline | None:
        return trace_first_token(engine, _request(next_prompt())) if profile else None

    seconds = _median_first_token(engine, unknown, repeats)
    cold = FirstToken(prompt, 0, seconds, trace(unknown))
    engine = Engine(model.model, slots=2, prefix_cache_bytes=2**30)
    known = random_ids(rng, config.chunk_size, vocab_size)

    def continued() -> np.ndarray:
        return np.concatenate([known, random_ids(rng, _TAIL, vocab_size)])

    seconds = _median_first_token(engine, continued, repeats)
    return [cold, FirstToken(len(known) + _TAIL, len(known), seconds, trace(continued))]


def _request(prompt: np.ndarray) -> Request:
    params = SamplingParams(temperature=GREEDY.temperature, max_tokens=_ANSWER)
    return Request(prompt=prompt, params=params)


def _median_first_token(engine: Engine, prompt: Callable[[], np.ndarray], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 2):
        request = _request(prompt())
        started = time.perf_counter()
        stream = engine.submit(request)
        while not stream.tokens:
            engine.step()
        seconds.append(time.perf_counter() - started)
        engine.cancel(stream)
        engine.run()
    return statistics.median(seconds[2:])


@partial(jax.jit, static_argnums=0)
def _hidden(
    graphdef: nnx.GraphDef, params: nnx.State, tokens: Int32[Array, "1 L"]
) -> Float[Array, "1 L D"]:
    model: LanguageModel = nnx.merge(graphdef, params)
    return model.hidden(tokens).hidden
