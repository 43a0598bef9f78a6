"""The engine: every request gets its own tokens, whatever runs beside it, and nothing compiles."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megalodon_jax.errors import EngineBusyError, RequestError
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling import SamplingParams
from megalodon_jax.inference.scheduling import FEATURE_SETS, Buckets, FairQueue, block_length
from tests.inference.models import CHUNK, VOCAB, greedy, next_logits, random_prompt, small_model

SLOTS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=2 * CHUNK + 3)
SEED = 7
SAMPLED = SamplingParams(temperature=0.8, top_k=20, top_p=0.95, seed=SEED, max_tokens=CHUNK + 3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(small_model(), slots=SLOTS, max_waiting=300, prefill_rows=3)


@pytest.fixture(scope="module")
def fixed_engine() -> Engine:
    return Engine(small_model(), slots=SLOTS, fixed_bucket=True)


@pytest.fixture(autouse=True)
def idle(request):
    """Every test leaves its engines without requests."""
    yield
    for name in ("engine", "fixed_engine"):
        if name in request.fixturenames:
            request.getfixturevalue(name).run()


class Compilations:
    """Counts compilations from here on."""

    def __enter__(self) -> list[str]:
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self.names

    def _listen(self, name: str, seconds: float, **_) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            self.names.append(name)

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 40, 3, 2 * CHUNK, 33, 5, 17, 47, 2)


def test_greedy_tokens_are_those_of_the_full_forward_pass(engine):
    """Across chunk borders, from prompts of every phase, rows entering and leaving."""
    params = [
        dataclasses.replace(GREEDY, max_tokens=1 + (7 * i) % 40 if i % 3 else GREEDY.max_tokens)
        for i in range(len(LENGTHS))
    ]
    prompts = [random_prompt(length, i) for i, length in enumerate(LENGTHS)]
    streams = [
        engine.submit(Request(prompt=prompt, params=each))
        for prompt, each in zip(prompts, params, strict=True)
    ]
    engine.run()
    for prompt, each, stream in zip(prompts, params, streams, strict=True):
        assert stream.tokens == greedy(prompt, each.max_tokens)
        assert stream.finish_reason == "length"


@pytest.mark.slow
def test_neighbours_and_slots_do_not_change_a_rows_tokens(fixed_engine):
    """Bit for bit in one bucket: log-probabilities are compared too."""
    prompt = random_prompt(21, 5)
    params = dataclasses.replace(SAMPLED, logprobs=3)
    alone = fixed_engine.submit(Request(prompt=prompt, params=params))
    fixed_engine.run()
    for others in (3, 6):
        neighbours = [
            fixed_engine.submit(Request(prompt=random_prompt(9 + i, i), params=SAMPLED))
            for i in range(others)
        ]
        beside = fixed_engine.submit(Request(prompt=prompt, params=params))
        fixed_engine.run()
        assert beside.tokens == alone.tokens
        assert beside.logprobs == alone.logprobs
        assert len({tuple(stream.tokens) for stream in neighbours}) > 1


@pytest.mark.slow
def test_buckets_draw_the_same_tokens(engine, fixed_engine):
    request = Request(prompt=random_prompt(12, 3), params=dataclasses.replace(SAMPLED, logprobs=0))
    streams = [each.submit(request) for each in (engine, fixed_engine)]
    for each in (engine, fixed_engine):
        each.run()
    small, large = streams
    assert small.tokens == large.tokens
    np.testing.assert_allclose(
        [entry.token for entry in small.logprobs], [entry.token for entry in large.logprobs],
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_logprobs_are_the_models(engine):
    prompt = random_prompt(13, 8)
    params = dataclasses.replace(SAMPLED, logprobs=4, max_tokens=5)
    stream = engine.submit(Request(prompt=prompt, params=params))
    engine.run()
    tokens = [int(token) for token in prompt]
    for token, entry in zip(stream.tokens, stream.logprobs, strict=True):
        expected = np.asarray(jax.nn.log_softmax(next_logits(tokens).astype(np.float64)))
        assert abs(entry.token - expected[token]) < 1e-4
        best = np.argsort(-expected)[:4]
        assert [index for index, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], expected[best], atol=1e-4)
        tokens.append(token)


def test_logprobs_of_the_prompt_are_the_models(engine):
    """Over several pieces, beside prompts that do not ask for them."""
    prompt = random_prompt(2 * CHUNK + 5, 4)
    others = [
        engine.submit(Request(prompt=random_prompt(2 * CHUNK + 3, seed), params=GREEDY))
        for seed in range(2)
    ]
    stream = engine.submit(Request(prompt=prompt, params=GREEDY, prompt_logprobs=3))
    engine.run()
    assert stream.tokens == greedy(prompt, GREEDY.max_tokens)
    assert not others[0].prompt_logprobs
    assert len(stream.prompt_logprobs) == len(prompt)
    assert stream.prompt_logprobs[0] is None
    for position in range(1, len(prompt)):
        scores = next_logits(prompt[:position]).astype(np.float64)
        expected = np.asarray(jax.nn.log_softmax(scores))
        entry = stream.prompt_logprobs[position]
        assert abs(entry.token - expected[prompt[position]]) < 1e-4
        best = np.argsort(-expected)[:3]
        assert [index for index, _ in entry.top] == best.tolist()
    with pytest.raises(RequestError, match="prompt_logprobs is 21; use 0 to 20"):
        engine.submit(Request(prompt=prompt, prompt_logprobs=21))


@pytest.mark.slow
def test_samples_share_a_prefill_and_differ(engine, monkeypatch):
    from megalodon_jax.inference import prefill_job as module

    pieces = []
    prefill_piece = module.prefill_piece
    monkeypatch.setattr(
        module, "prefill_piece", lambda *args: pieces.append(args[-1]) or prefill_piece(*args)
    )
    request = Request(prompt=random_prompt(40, 1), params=SAMPLED)
    samples = engine.submit_samples(request, 5)
    engine.run()
    assert sum(piece.count for piece in pieces) == 40
    assert len({tuple(stream.tokens) for stream in samples}) == 5
    again = engine.submit(
        dataclasses.replace(request, params=dataclasses.replace(SAMPLED, seed=SEED + 3))
    )
    assert again.result() == samples[3].tokens


def test_a_stop_id_ends_a_row_and_is_not_part_of_it(engine):
    prompt = random_prompt(20, 2)
    tokens = greedy(prompt, GREEDY.max_tokens)
    stop = tokens[6]
    params = dataclasses.replace(GREEDY, stop_ids=(VOCAB - 1 if stop != VOCAB - 1 else 0, stop))
    stream = engine.submit(Request(prompt=prompt, params=params))
    engine.run()
    assert stream.tokens == tokens[: tokens.index(stop)]
    assert stream.finish_reason == "stop"


def test_a_slot_is_clean_after_a_row_of_nan(fixed_engine):
    prompts = [random_prompt(18, i) for i in range(SLOTS)]
    state = fixed_engine._state

    def poison(leaf):
        return leaf * jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    fixed_engine._state = state._replace(cache=jax.tree.map(poison, state.cache))
    streams = [fixed_engine.submit(Request(prompt=prompt, params=GREEDY)) for prompt in prompts]
    fixed_engine.run()
    for prompt, stream in zip(prompts, streams, strict=True):
        assert stream.tokens == greedy(prompt, GREEDY.max_tokens)


def test_scores_of_nan_end_a_request(engine):
    """In its own row alone."""
    good = engine.submit(Request(prompt=random_prompt(5), params=GREEDY))
    longer = dataclasses.replace(GREEDY, max_tokens=200)
    bad = engine.submit(Request(prompt=random_prompt(6), params=longer))
    while len(bad.tokens) < 2:
        engine.step()
    slot = engine._streams.index(bad)
    state = engine._state
    engine._state = state._replace(
        cache=dataclasses.replace(
            state.cache,
            final_norm=state.cache.final_norm._replace(
                mean=state.cache.final_norm.mean.at[slot].set(jnp.nan)
            ),
        )
    )
    engine.run()
    assert bad.finish_reason == "invalid"
    assert good.tokens == greedy(random_prompt(5), GREEDY.max_tokens)


@pytest.mark.slow
def test_cancellation_anywhere(engine):
    """In the queue, in prefill, in mid-block; the others are not disturbed."""
    prompts = [random_prompt(30 + i, i) for i in range(2 * SLOTS)]
    streams = [engine.submit(Request(prompt=prompt, params=GREEDY)) for prompt in prompts]
    engine.cancel(streams[-1])
    engine.step()
    engine.cancel(streams[0])
    while not streams[3].tokens:
        engine.step()
    engine.cancel(streams[3])
    kept = list(streams[3].tokens)
    engine.run()
    for index, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
        if index in (0, 3, len(streams) - 1):
            assert stream.finish_reason == "cancelled"
        else:
            assert stream.tokens == greedy(prompt, GREEDY.max_tokens)
    assert streams[3].tokens == kept
    assert engine.num_running == engine.num_waiting == 0


@pytest.mark.slow
def test_a_mask_limits_the_tokens(engine):
    allowed = (3, 17, 44)

    def mask(tokens):
        """Every second token is one of three."""
        if len(tokens) % 2:
            return None
        words = np.zeros(-(-VOCAB // 32), np.uint32)
        for token in allowed:
            words[token // 32] |= np.uint32(1 << (token % 32))
        return words.view(np.int32)

    plain = engine.submit(Request(prompt=random_prompt(7), params=GREEDY))
    params = dataclasses.replace(SAMPLED, max_tokens=9)
    stream = engine.submit(Request(prompt=random_prompt(4), params=params, logits_mask=mask))
    engine.run()
    assert set(stream.tokens[::2]) <= set(allowed)
    assert not set(stream.tokens[1::2]) <= set(allowed)
    assert plain.tokens == greedy(random_prompt(7), GREEDY.max_tokens)


def test_iterating_steps_the_engine(engine):
    other = engine.submit(Request(prompt=random_prompt(9), params=GREEDY))
    stream = engine.submit(Request(prompt=random_prompt(3), params=GREEDY))
    assert list(stream) == stream.tokens == greedy(random_prompt(3), GREEDY.max_tokens)
    assert other.result() == greedy(random_prompt(9), GREEDY.max_tokens)


def test_impossible_requests_are_refused(engine):
    def refused(match: str, prompt=(1, 2), **params) -> None:
        with pytest.raises(RequestError, match=match):
            engine.submit(Request(prompt=prompt, params=SamplingParams(temperature=0.0, **params)))

    refused("at least one token id", prompt=())
    refused("the model knows 0 to 61", prompt=(1, VOCAB))
    refused("integer token ids", prompt=(0.5,))
    refused("stop strings need a tokenizer", stop=("x",))
    refused("17 stop ids; use at most 16", stop_ids=tuple(range(17)))
    refused("use ids below 62", stop_ids=(VOCAB,))
    with pytest.raises(RequestError, match="n is 9; use 1 to 8"):
        engine.submit_samples(Request(prompt=(1,)), SLOTS + 1)
    with pytest.raises(ValueError, match="use at least 2"):
        Engine(small_model(), slots=1)
    assert engine.is_idle


def test_a_full_queue_is_an_error(engine):
    streams = [engine.submit(Request(prompt=(1,), params=GREEDY)) for _ in range(300)]
    with pytest.raises(EngineBusyError, match="300 requests are waiting"):
        engine.submit(Request(prompt=(1,), params=GREEDY))
    for stream in streams:
        engine.cancel(stream)


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_compiles_under_load():
    """200 requests, every seventh cancelled, sampling parameters of every kind."""
    engine = Engine(small_model(), slots=SLOTS, max_waiting=300, prefix_cache_bytes=1 << 20)
    engine.warm_up()
    rng = np.random.default_rng(0)
    prompts = [random_prompt(int(rng.integers(1, 70)), i) for i in range(200)]
    kinds = [
        GREEDY,
        SAMPLED,
        SamplingParams(temperature=1.3, min_p=0.05, seed=1),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(
            temperature=0.0, logit_bias={3: 0.5}, logprobs=2, stop_ids=tuple(range(0, 60, 5))
        ),
    ]
    requests = [
        Request(
            prompt=prompt,
            params=dataclasses.replace(
                kinds[i % len(kinds)], max_tokens=int(rng.integers(1, 40)), seed=i
            ),
            client=f"client {i % 3}",
        )
        for i, prompt in enumerate(prompts)
    ]
    with Compilations() as compilations:
        streams = [engine.submit(request) for request in requests]
        for count in range(10_000):
            if engine.is_idle:
                break
            engine.step()
            for index in range(count % 7, len(streams), 97):
                if index % 7 == 0:
                    engine.cancel(streams[index])
    assert not compilations
    reasons = [stream.finish_reason for stream in streams]
    assert set(reasons) == {"length", "stop", "cancelled"}
    for stream in streams:
        assert len(stream.tokens) <= stream.request.params.max_tokens
        if stream.finish_reason == "length":
            assert len(stream.tokens) == stream.request.params.max_tokens
    for index in (5, 50, 110):
        request = streams[index].request
        if request.params is not None and streams[index].finish_reason == "length":
            expected = greedy(request.prompt, request.params.max_tokens)
            if index % len(kinds) == 0:
                assert streams[index].tokens == expected


def test_the_queue_takes_turns():
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(item[0], item)
    queue.drop(lambda item: item == "a2")
    assert len(queue) == 5
    assert [queue.get() for _ in range(5)] == ["a1", "b1", "c1", "a3", "b2"]


def test_buckets_and_blocks():
    assert Buckets.up_to(64).sizes == (2, 8, 32, 64)
    assert Buckets.up_to(2).sizes == (2,)
    assert [Buckets.up_to(20).of(rows) for rows in (1, 2, 3, 8, 9, 20)] == [2, 2, 8, 8, 20, 20]
    idle: Any = {"is_short": False, "is_filling": False, "is_constrained": False}
    # A block may have some steps too many.
    assert [block_length(left, **idle) for left in (100, 24, 23, 7, 0)] == [32, 32, 8, 8, 8]
    assert block_length(100, **idle | {"is_short": True}) == 8
    assert block_length(100, **idle | {"is_short": True, "is_filling": True}) == 1
    assert block_length(100, **idle | {"is_constrained": True}) == 1
    assert len(set(FEATURE_SETS)) == 3
