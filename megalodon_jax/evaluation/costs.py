"""The cost of inference: prefill by length, and a decoding step."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.compiled.memory import read_memory
from megalodon_jax.evaluation.variants import with_cache_in_place
from megalodon_jax.generate import max_length
from megalodon_jax.inference.decoders import AnyDecodeWeights, decode, prepare_decoding
from megalodon_jax.inference.graph import HashedGraphDef
from megalodon_jax.inference.prefill import (
    PieceSizes,
    PrefillState,
    empty_prefill_state,
    prefill_padded,
    prefill_piece,
    prefill_whole,
)
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.typing import Array, Int32

# Tokens before the timed ones, and the timed ones of one call.
_DECODE_CONTEXT = 1024
_DECODE_STEPS = 64


class PrefillCost(NamedTuple):
    """The cost of reading prompts of one length.

    Attributes:
      length: tokens of a prompt.
      rows: prompts that are read side by side.
      seconds: median wall time of the whole prefill; None if it did not fit the device.
      tokens_per_second: of all rows.
      cache_bytes: of the cache after it, all rows together.
      program_peak_bytes: most device memory of the largest program of this prefill, its arguments
        (parameters, cache) included, as the compiler reports it; None if it reports nothing.
      device_peak_bytes: most device memory that this process has used so far, as the device reports
        it; None if it reports nothing. Lengths are measured in ascending order.
      reason: why it did not fit.
    """

    length: int
    rows: int
    seconds: float | None
    tokens_per_second: float | None
    cache_bytes: int
    program_peak_bytes: int | None
    device_peak_bytes: int | None
    reason: str | None = None


def prefill_cost(
    model: LanguageModel,
    *,
    lengths: Sequence[int],
    rows: int = 1,
    repeats: int = 3,
    on_result: Callable[[PrefillCost], None] | None = None,
) -> tuple[PrefillCost, ...]:
    """Time and memory of the prefill of random tokens, by length, on the default device.

    A prompt goes through the model in the pieces of the inference engine, a Transformer with its
    cache updated in place. One prefill comes before the timed ones, so that compilation is not
    timed.

    Args:
      model: the model.
      lengths: tokens of the prompts.
      rows: prompts that are read side by side.
      repeats: timed prefills of every length.
      on_result: receives the result of every length as soon as it is measured.

    Returns:
      A result for every length, in ascending order.

    Raises:
      ValueError: an argument is out of range.
    """
    if not lengths or min(lengths) < 1 or rows < 1 or repeats < 1:
        raise ValueError(
            f"lengths are {tuple(lengths)}, rows {rows} and repeats {repeats}; use 1 or more"
        )
    graphdef, params = nnx.split(with_cache_in_place(model))
    split = (HashedGraphDef(graphdef), params)
    peaks: dict[Any, int | None] = {}
    results = []
    for length in sorted(lengths):
        results.append(_prefill_cost(model, split, length, rows, repeats, peaks))
        if on_result is not None:
            on_result(results[-1])
    return tuple(results)


def decode_seconds(model: LanguageModel, *, rows: int = 1, repeats: int = 3) -> float:
    """Median seconds of a decoding step of `rows` rows, after about a thousand tokens of each.

    Args:
      model: the model.
      rows: rows that are decoded side by side.
      repeats: timed calls of 64 steps, after one call for warm-up.
    """
    total = _DECODE_CONTEXT + _DECODE_STEPS * (repeats + 1)
    graphdef, params = nnx.split(model)
    weights = jax.jit(lambda params: prepare_decoding(nnx.merge(graphdef, params)))(params)
    tokens = _random_tokens(model, rows, _DECODE_CONTEXT)
    state = empty_prefill_state(graphdef, params, rows, max_length(model, total))
    cache = prefill_whole(graphdef, params, state, tokens).cache
    token, seconds = jnp.asarray(tokens[:, -1]), []
    for _ in range(repeats + 1):
        jax.block_until_ready((token, cache))
        started = time.perf_counter()
        token, cache = jax.block_until_ready(_decode_steps(weights, cache, token))
        seconds.append((time.perf_counter() - started) / _DECODE_STEPS)
    return statistics.median(seconds[1:])


def _prefill_cost(
    model: LanguageModel,
    split: tuple[nnx.GraphDef, nnx.State],
    length: int,
    rows: int,
    repeats: int,
    peaks: dict[Any, int | None],
) -> PrefillCost:
    tokens = _random_tokens(model, rows, length)
    counts = np.full(rows, length, np.int32)
    room = max_length(model, length)
    pieces = list(PieceSizes.for_model(model).split(length))

    def empty_state() -> PrefillState:
        return empty_prefill_state(*split, rows, room)

    shapes = jax.eval_shape(empty_state)
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.cache))
    seconds, reason = [], None
    try:
        for _ in range(repeats + 1):
            state = jax.block_until_ready(empty_state())
            started = time.perf_counter()
            for piece in pieces:
                state = prefill_piece(*split, state, tokens, counts, piece)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - started)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
    key = (pieces[0].size, pieces[0].is_whole, room)
    if key not in peaks and reason is None:
        peaks[key] = _program_peak(split, shapes, rows, pieces[0].size, pieces[0].is_whole)
    median = None if reason else statistics.median(seconds[1:])
    device_stats = jax.devices()[0].memory_stats() or {}
    return PrefillCost(
        length=length,
        rows=rows,
        seconds=median,
        tokens_per_second=rows * length / median if median else None,
        cache_bytes=cache_bytes,
        program_peak_bytes=peaks.get(key),
        device_peak_bytes=device_stats.get("peak_bytes_in_use"),
        reason=reason,
    )


def _program_peak(
    split: tuple[nnx.GraphDef, nnx.State], state: Any, rows: int, size: int, is_whole: bool
) -> int | None:
    """Most memory of the program of one piece."""
    tokens = jax.ShapeDtypeStruct((rows, size), jnp.int32)
    if is_whole:
        lowered = prefill_whole.lower(*split, state, tokens)
    else:
        counts = jax.ShapeDtypeStruct((rows,), jnp.int32)
        lowered = prefill_padded.lower(*split, state, tokens, counts)
    memory = read_memory(lowered.compile())
    return None if memory is None else memory.peak


def _random_tokens(model: LanguageModel, rows: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(length)
    return rng.integers(model.config.vocab_size, size=(rows, length), dtype=np.int32)


@partial(jax.jit, donate_argnums=1)
def _decode_steps(
    weights: AnyDecodeWeights, cache: Any, token: Int32[Array, " B"]
) -> tuple[Int32[Array, " B"], Any]:
    """64 greedy steps."""

    def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], None]:
        token, cache = carry
        logits, cache = decode(weights, cache, token, jnp.ones(token.shape, bool))
        return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), None

    (token, cache), _ = jax.lax.scan(step, (token, cache), length=_DECODE_STEPS)
    return token, cache
