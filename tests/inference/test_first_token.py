"""The cost of a first token on the host: programs, transfers and their size."""

from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from megalodon_jax.bench.decode_timeline import jitted_calls, read_spans, trace_first_token
from megalodon_jax.inference.blocks import Emitted
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.packed import Packed
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling import Logprobs, SamplingParams
from tests.inference.models import CHUNK, greedy, random_prompt, small_model

PARAMS = SamplingParams(temperature=0.0, max_tokens=9)
PENALIZED = SamplingParams(
    seed=3, max_tokens=9, repetition_penalty=1.2, logit_bias={5: 2.0}, logprobs=3
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(small_model(), slots=2, prefix_cache_bytes=1 << 20)


def first_token(engine: Engine, prompt: np.ndarray, params: SamplingParams) -> int:
    stream = engine.submit(Request(prompt=prompt, params=params))
    while not stream.tokens:
        engine.step()
    token = stream.tokens[0]
    engine.cancel(stream)
    engine.run()
    return token


def host_events(folder: Path) -> Counter[str]:
    """Calls of jitted functions by name, and transfers, in the trace of one thread."""
    (trace,) = folder.rglob("*.xplane.pb")
    host, _ = read_spans(trace)
    transfers = [span.name for span in host if span.name in ("DevicePut", "np.asarray(jax.Array)")]
    return Counter([*transfers, *(call.name for call in jitted_calls(host))])


@pytest.mark.parametrize("params", [PARAMS, PENALIZED], ids=["greedy", "all features"])
def test_a_known_prompt_takes_one_program_and_a_transfer_each_way(engine, params, tmp_path):
    beginning = random_prompt(CHUNK, 1)
    prompts = [np.append(beginning, random_prompt(5, seed)) for seed in range(3)]
    for prompt in prompts[:2]:
        first_token(engine, prompt, params)
    stream = engine.submit(Request(prompt=prompts[2], params=params))
    jax.block_until_ready(engine._state)
    with jax.profiler.trace(tmp_path):
        engine.step()
    assert len(stream.tokens) == 1
    engine.run()
    if params is PARAMS:
        assert stream.tokens == greedy(prompts[2], PARAMS.max_tokens)
    found = host_events(tmp_path)
    assert found == {
        "PjitFunction(start_known_row)": 1, "DevicePut": 1, "np.asarray(jax.Array)": 1
    }  # fmt: skip


def test_a_short_prompt_takes_three_programs(engine, tmp_path):
    """Its empty state is the one that the engine made after the prompt before it."""
    for seed in range(2):
        first_token(engine, random_prompt(9, seed), PARAMS)
    stream = engine.submit(Request(prompt=random_prompt(9, 2), params=PARAMS))
    jax.block_until_ready(engine._state)
    with jax.profiler.trace(tmp_path):
        engine.step()
    assert len(stream.tokens) == 1
    engine.run()
    found = host_events(tmp_path)
    # Tokens, their counts, and the request.
    assert found.pop("DevicePut") == 3
    assert found == {
        "PjitFunction(prefill_padded)": 1,
        "PjitFunction(start_row)": 1,
        "PjitFunction(empty_prefill_state)": 1,
        "np.asarray(jax.Array)": 1,
    }


def test_packed_trees_come_back_bit_for_bit():
    tree = {
        "flags": np.arange(13) % 3 == 0,
        "empty": np.zeros((0, 2), np.float32),
        "floats": np.array([[np.nan, -0.0, 1e-45], [np.inf, 3.5, -2.0]], np.float32),
        "seed": np.array([2**32 - 1, 7], np.uint32),
        "count": np.int32(-5),
        "no": None,
    }
    packed = Packed.of(tree)
    assert packed.words.nbytes == 16 + 24 + 8 + 4
    found = jax.jit(Packed.unpack)(packed)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert np.asarray(new).tobytes() == old.tobytes()


def test_packing_refuses_other_widths():
    with pytest.raises(ValueError, match="int64; pack bool and dtypes of 32 bits"):
        Packed.of((np.zeros(3, np.int64),))


@pytest.mark.parametrize("count", [0, 3])
def test_emitted_tokens_come_back_bit_for_bit(count):
    rng = np.random.default_rng(count)
    tokens = rng.integers(-1, 50, (4, 3)).astype(np.int32)
    valid = rng.random((4, 3)) < 0.5
    token = rng.normal(size=(4, 3)).astype(np.float32)
    token[0, 0] = np.nan
    ids = rng.integers(0, 50, (4, 3, count)).astype(np.int32)
    top = rng.normal(size=(4, 3, count)).astype(np.float32)
    emitted = jax.jit(Emitted.of)(tokens, Logprobs(token, ids, top), valid)
    for each in (emitted, jax.device_get(emitted)):
        np.testing.assert_array_equal(each.tokens, tokens)
        np.testing.assert_array_equal(each.valid, valid)
        for new, old in zip(each.logprobs, (token, ids, top), strict=True):
            np.testing.assert_array_equal(new, old)


def test_the_timeline_of_a_request_is_in_order(engine):
    prompt = np.append(random_prompt(CHUNK, 4), random_prompt(5, 4))
    for _ in range(2):
        first_token(engine, prompt, PARAMS)
    timeline = trace_first_token(engine, Request(prompt=prompt, params=PARAMS))
    assert (timeline.programs, timeline.transfers) == (1, 1)
    assert 0.0 < timeline.called < timeline.returned < timeline.token
    assert "1 programs and 1 transfers" in str(timeline)
    assert engine.is_idle
