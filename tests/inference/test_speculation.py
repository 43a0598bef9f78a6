"""Speculation: the tokens and states of plain decoding, whatever the drafts are."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.config import TransformerConfig
from megalodon_jax.inference.blocks import decode_block, empty_slots, padded_stop_ids
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.positions import commit, decode_positions
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling import Features, SamplingParams, empty_state, sampling_row
from megalodon_jax.inference.speculation import (
    SpeculationSettings,
    append_tokens,
    look_up,
    speculative_block,
)
from megalodon_jax.inference.step import decode
from megalodon_jax.inference.weights import prepare
from tests.ablations import VARIANTS
from tests.golden_files import relative_error
from tests.inference.models import CHUNK, CONFIG, VOCAB, greedy, random_prompt, small_model
from tests.inference.models import set_row as set_sampling
from tests.inference.test_engine import Compilations
from tests.inference.test_step import OTHERS
from tests.model.conftest import perturbed

# ---- Several tokens at once.

T = 5
# Variants that change all switches at once.
WHOLE = ("default", "tied, prior, no affine", "all, ema", "all, no average")
# Tokens before the border: more than T, fewer, one; a row at the border; a new row.
STARTS = np.array([9, CHUNK - 3, CHUNK - 1, CHUNK, 0])
B, S = len(STARTS), 7


def states(cache, row: int):
    """Everything of a row but its keys and values."""
    layers = [layer._replace(keys_and_values=None) for layer in cache.layers]
    return jax.tree.map(
        lambda leaf: np.asarray(leaf)[row],
        (cache.position, cache.segment, layers, cache.final_norm),
    )


def assert_near(found, expected, limit: float = 2e-6):
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if np.issubdtype(old.dtype, np.integer) or not old.any():
            np.testing.assert_array_equal(new, old)
        else:
            assert relative_error(new, old) <= limit


def poisoned_slots(cache):
    """Keys of NaN and large values in all slots that no token of the row's chunk fills."""
    is_free = np.arange(CHUNK) >= np.asarray(cache.position)[:, None] % CHUNK
    is_free = is_free[:, None, :, None]

    def poison(slots):
        key, value = slots
        return slots._replace(
            key=jnp.where(is_free, jnp.nan, key), value=jnp.where(is_free, 1e30, value)
        )

    layers = (
        layer._replace(keys_and_values=poison(layer.keys_and_values)) for layer in cache.layers
    )
    return dataclasses.replace(cache, layers=tuple(layers))


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[] if name == "default" else pytest.mark.slow) for name in WHOLE],
)
def test_several_tokens_at_once_equal_as_many_steps(variant: str):
    """Scores, and after any accepted number the states and the next token's scores."""
    model = perturbed(dataclasses.replace(CONFIG, **(OTHERS | VARIANTS)[variant]))
    weights, step = jax.jit(prepare)(model), jax.jit(decode)
    rng = np.random.default_rng(0)
    cache = model.init_cache(S)
    for i in range(STARTS.max()):
        tokens = rng.integers(0, VOCAB, B).astype(np.int32)
        cache = step(weights, cache, tokens, i < STARTS).cache
    cache = poisoned_slots(cache)
    tokens = rng.integers(0, VOCAB, (B, T + 1)).astype(np.int32)
    everyone = np.ones(B, bool)
    expected, caches = [], [cache]
    for t in range(T + 1):
        logits, after = step(weights, caches[-1], tokens[:, t], everyone)
        expected.append(np.asarray(logits))
        caches.append(after)
    logits, pending_cache, pending = jax.jit(decode_positions)(weights, cache, tokens[:, :T])
    room = np.minimum(T, CHUNK - STARTS % CHUNK)
    assert sorted(room) == [1, 3, 5, 5, 5]
    for row, count in enumerate(room):
        for t in range(count):
            assert relative_error(np.asarray(logits)[row, t], expected[t][row]) <= 2e-6
    committed = jax.jit(commit)
    for most in range(T + 1):
        # Also different numbers in one call.
        accepted = np.minimum(most + np.arange(B) * (most % 2), room) % (T + 1)
        after = committed(weights, pending_cache, pending, accepted.astype(np.int32))
        next_tokens = tokens[np.arange(B), accepted]
        next_logits, _ = step(weights, after, next_tokens, everyone)
        for row, count in enumerate(accepted):
            assert_near(states(after, row), states(caches[count], row))
            assert relative_error(np.asarray(next_logits)[row], expected[count][row]) <= 2e-6
            if not count:
                jax.tree.map(np.testing.assert_array_equal, states(after, row), states(cache, row))
        for row in range(B, S):
            jax.tree.map(np.testing.assert_array_equal, states(after, row), states(cache, row))


# ---- Drafts.


def drafts_by_definition(tokens: list[int], k: int) -> list[int]:
    """The continuation of the latest earlier occurrence of the last three, else two, tokens."""
    for size in (3, 2):
        for end in range(len(tokens) - 2, size - 2, -1):
            if tokens[-size:] == tokens[end - size + 1 : end + 1]:
                known = tokens[end + 1 :]
                return [known[i % len(known)] for i in range(k)]
    return [-1] * k


def test_drafts_continue_the_latest_occurrence():
    rng = np.random.default_rng(0)
    window, k = 12, 4
    rows = [rng.integers(0, 3, rng.integers(1, 40)).tolist() for _ in range(300)]
    rows += [[], [1], [1, 1], [1, 1, 1], [2, 1, 2, 1], [0] * window]
    history = np.full((len(rows), window), -1, np.int32)
    for row, tokens in enumerate(rows):
        if tokens:
            history[row, -len(tokens) :] = tokens[-window:]
    found = np.asarray(jax.jit(look_up, static_argnums=1)(history, k))
    expected = [drafts_by_definition(tokens[-window:], k) for tokens in rows]
    np.testing.assert_array_equal(found, expected)
    assert {-1, 0, 1, 2} == set(found.ravel())


def test_a_history_holds_the_latest_tokens():
    tokens = np.arange(40, dtype=np.int32).reshape(4, 10)
    counts = np.array([0, 3, 10, 7])
    old = np.full((4, 6), -1, np.int32)
    new = append_tokens(old, tokens, counts)
    for row, count in enumerate(counts):
        expected = [-1] * 6 + tokens[row, :count].tolist()
        np.testing.assert_array_equal(new[row], expected[-6:])


# ---- Blocks.

LENGTH = 45
ALL = Features(True, True, True, True, True, True, 2)
KINDS = (
    SamplingParams(temperature=0.0, max_tokens=LENGTH),
    SamplingParams(temperature=0.9, top_k=30, top_p=0.95, seed=1, max_tokens=LENGTH - 2),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.6, max_tokens=37),
    SamplingParams(
        temperature=0.7,
        min_p=0.02,
        presence_penalty=0.8,
        logit_bias={7: 1.5},
        seed=9,
        max_tokens=44,
    ),
    SamplingParams(temperature=1.1, seed=5, max_tokens=1),
)
ROWS = len(KINDS)


@functools.cache
def block_weights():
    return jax.jit(prepare)(small_model())


def first_slots(stop_ids=((),) * ROWS, inactive=()):
    """Slots of new rows, in which the first token is pending."""
    sampling = empty_state(ROWS + 1, vocab_size=VOCAB)
    for slot, params in enumerate(KINDS):
        sampling = set_sampling(
            sampling, slot, sampling_row(params, vocab_size=VOCAB, prompt=[slot, 3])
        )
    slots = jax.jit(empty_slots)(small_model().init_cache(ROWS + 1), sampling)
    active = np.append([slot not in inactive for slot in range(ROWS)], False)
    padded = [padded_stop_ids(ids) for ids in (*stop_ids, ())]
    return slots._replace(
        token=jnp.arange(ROWS + 1, dtype=jnp.int32) + 11,
        active=jnp.asarray(active),
        remaining=jnp.array([*(params.max_tokens for params in KINDS), 0], jnp.int32),
        stop_ids=jnp.asarray(np.stack(padded)),
    )


def plain_tokens(**options):
    slots, emitted = decode_block(block_weights(), first_slots(**options), ROWS, LENGTH, ALL, None)
    return slots, emitted, columns(emitted)


def columns(emitted) -> list[list[int]]:
    tokens = np.asarray(emitted.tokens)
    return [column[column >= 0].tolist() for column in tokens.T]


def histories(tokens: list[list[int]], wrong: float) -> np.ndarray:
    """Histories that know the answer, with a share of wrong tokens."""
    rng = np.random.default_rng(4)
    history = np.full((ROWS + 1, 3 * LENGTH), -1, np.int32)
    for row, answer in enumerate(tokens):
        known = np.array([11 + row, *answer])
        is_wrong = rng.random(len(known)) < wrong
        known = np.where(is_wrong, rng.integers(0, VOCAB, len(known)), known)
        text = [50, *known, 50, 11 + row]
        history[row, -len(text) :] = text
    return history


def speculate(history, **options):
    block = speculative_block(
        block_weights(), first_slots(**options), jnp.asarray(history), ROWS, LENGTH, ALL, 4
    )
    steps = (np.asarray(block.emitted.tokens) >= 0).reshape(LENGTH, 5, ROWS).sum(axis=1)
    return block, steps


def assert_same_slots(found, expected):
    for name in ("token", "active", "remaining", "stop_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    jax.tree.map(np.testing.assert_array_equal, found.sampling, expected.sampling)
    for row in range(ROWS + 1):
        assert_near(states(found.cache, row), states(expected.cache, row), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [0.0, 0.25, 1.0],
)
def test_blocks_equal_plain_blocks_whatever_the_drafts(wrong: float):
    """Greedy and sampled rows, penalties, bias; also log-probabilities and all progress."""
    expected_slots, expected, tokens = plain_tokens()
    assert [len(each) for each in tokens] == [params.max_tokens for params in KINDS]
    block, steps = speculate(histories(tokens, wrong))
    assert columns(block.emitted) == tokens
    assert_same_slots(block.slots, expected_slots)
    np.testing.assert_array_equal(block.slots.sampling.counts.sum(1)[:ROWS], list(map(len, tokens)))
    found, wanted = (each.tokens >= 0 for each in (block.emitted, expected))
    for row in range(ROWS):
        for new, old in zip(block.emitted.logprobs, expected.logprobs, strict=True):
            new, old = np.asarray(new)[found[:, row], row], np.asarray(old)[wanted[:, row], row]
            np.testing.assert_allclose(new, old, atol=2e-5)
    assert np.asarray(block.emitted.valid)[found].all()
    if wrong == 0.0:
        # 45 tokens in chunks of 16: drafts end at a border.
        assert (steps[:, 0] > 0).sum() <= 14
        assert steps.max() == 5
    elif wrong < 1.0:
        assert set(steps[:, :4].ravel()) >= {0, 1, 2, 3, 4, 5}
    for row, answer in enumerate(tokens):
        np.testing.assert_array_equal(block.history[row, -len(answer) :], answer)


@pytest.mark.slow
def test_rows_end_inside_a_step():
    """At a stop id among accepted tokens, and at the last token: the rest is dropped."""
    _, _, free = plain_tokens()
    lengths, stop_ids = set(), []
    for row, answer in enumerate(free):
        wanted = min(len(answer), 6 + 3 * row) - 1
        stop_ids.append((answer[wanted], 60))
    for inactive in ((), (1, 3)):
        options = {"stop_ids": tuple(stop_ids), "inactive": inactive}
        expected_slots, _, tokens = plain_tokens(**options)
        # The histories go on behind the stop id, so the tokens behind it are accepted drafts.
        block, steps = speculate(histories(free, 0.0), **options)
        assert columns(block.emitted) == tokens
        assert_same_slots(block.slots, expected_slots)
        for row, answer in enumerate(tokens):
            assert len(answer) == 0 if row in inactive else answer == free[row][: len(answer)]
        lengths |= {
            int(steps[:, row][steps[:, row] > 0][-1]) for row in range(4) if row not in inactive
        }
        assert not block.slots.active.any()
    # A row that ended with its step's last accepted token would not show it.
    assert lengths & {1, 2, 3, 4}


@pytest.mark.slow
def test_a_block_updates_the_cache_in_place():
    """No operation of the compiled steps copies keys and values of all slots."""
    config = dataclasses.replace(CONFIG, chunk_size=256, model_dim=64, value_dim=128, z_dim=32)
    rows = 4

    def make():
        model = perturbed(config)
        slots = empty_slots(model.init_cache(rows), empty_state(rows, vocab_size=VOCAB))
        return prepare(model), slots

    weights, slots = jax.eval_shape(make)
    history = jax.ShapeDtypeStruct((rows, 64), jnp.int32)
    compiled = speculative_block.lower(weights, slots, history, rows, 8, Features(), 4).compile(
        {"xla_backend_optimization_level": 3}
    )
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text
    assert memory
    leaves = jax.tree.leaves([layer.keys_and_values for layer in slots.cache.layers])
    shapes = {f"[{','.join(map(str, leaf.shape))}]" for leaf in leaves}
    copies = [
        line
        for line in text.splitlines()
        if re.search(r" (copy|concatenate|transpose)\(", line)
        and any(shape in line.split(" = ")[1].split("{")[0] for shape in shapes)
    ]
    assert not copies
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert memory.alias_size_in_bytes >= cache_bytes


# ---- The engine.

GREEDY = SamplingParams(temperature=0.0, max_tokens=2 * CHUNK + 3)
SAMPLED = SamplingParams(temperature=0.8, top_k=20, top_p=0.95, seed=7, max_tokens=CHUNK + 3)


@pytest.fixture(scope="module")
def plain() -> Engine:
    return Engine(small_model(), slots=8)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(small_model(), slots=8, speculation=SpeculationSettings(max_rows=2, window=64))


def repetitive_prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.resize(random_prompt(7, seed), length)


@pytest.mark.slow
def test_an_engine_with_speculation_draws_the_same_tokens(plain, engine):
    """Rows enter and leave, and buckets with and without speculation follow each other."""
    prompts = [
        repetitive_prompt(20 + 5 * i, i) if i % 2 else random_prompt(30, i) for i in range(11)
    ]
    requests = [
        Request(
            prompt=prompt,
            params=dataclasses.replace(GREEDY if i % 3 else SAMPLED, max_tokens=5 + 6 * i, seed=i),
        )
        for i, prompt in enumerate(prompts)
    ]
    results = []
    for each in (plain, engine):
        streams = [each.submit(request) for request in requests]
        each.run()
        results.append([(stream.tokens, stream.finish_reason) for stream in streams])
    assert results[0] == results[1]
    for i, prompt in enumerate(prompts):
        if i % 3:
            assert results[1][i][0] == greedy(prompt, 5 + 6 * i)


@pytest.mark.slow
def test_drafts_are_accepted(engine):
    before = engine._speculator._accepted
    prompt = repetitive_prompt(40)
    stream = engine.submit(
        Request(prompt=prompt, params=dataclasses.replace(GREEDY, max_tokens=60))
    )
    engine.run()
    assert stream.tokens == greedy(prompt, 60)
    assert engine._speculator._accepted > before
    assert 0 < engine.acceptance <= 4


@pytest.mark.slow
def test_a_masked_row_runs_without_speculation(plain, engine):
    def mask(tokens):
        words = np.full(-(-VOCAB // 32), -1, np.int32)
        words[0] = 0
        return words if len(tokens) % 2 else None

    requests = [
        Request(
            prompt=random_prompt(9),
            params=dataclasses.replace(SAMPLED, max_tokens=8),
            logits_mask=mask,
        ),
        Request(prompt=repetitive_prompt(30), params=GREEDY),
    ]
    results = []
    for each in (plain, engine):
        streams = [each.submit(request) for request in requests]
        each.run()
        results.append([stream.tokens for stream in streams])
    assert results[0] == results[1]
    assert min(results[1][0][1::2]) >= 32


@pytest.mark.slow
def test_sessions_are_those_of_plain_decoding(plain, engine):
    for params in (GREEDY, dataclasses.replace(GREEDY, max_tokens=21, stop_ids=(5,)), SAMPLED):
        request = Request(prompt=repetitive_prompt(33), params=params, keep_session=True)
        first, second = (each.submit(request) for each in (plain, engine))
        plain.run()
        engine.run()
        assert first.tokens == second.tokens
        expected, found = first.session, second.session
        assert found.pending == expected.pending
        assert found.num_tokens == expected.num_tokens
        assert_near(found.cache, expected.cache, 1e-5)
        again = [
            each.submit(Request(prompt=random_prompt(4), params=GREEDY, session=found))
            for each in (plain, engine)
        ]
        plain.run()
        engine.run()
        assert again[0].tokens == again[1].tokens


@pytest.mark.slow
def test_nothing_compiles_after_warm_up():
    settings = SpeculationSettings(num_drafts=2, max_rows=2, window=32)
    engine = Engine(small_model(), slots=3, speculation=settings)
    engine.warm_up([Features()])
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 9)
    prompts = [repetitive_prompt(length, i) for i, length in enumerate(lengths)]
    with Compilations() as compilations:
        streams = [
            engine.submit(
                Request(prompt=prompt, params=dataclasses.replace(GREEDY, max_tokens=3 + 5 * i))
            )
            for i, prompt in enumerate(prompts)
        ]
        engine.run()
    assert not compilations
    assert engine.acceptance > 0
    for i, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
        assert stream.tokens == greedy(prompt, 3 + 5 * i)


def test_impossible_settings_are_refused():
    for name, value in (("num_drafts", 0), ("max_rows", 1), ("window", 3)):
        with pytest.raises(ValueError, match=f"{name} is {value}; use at least"):
            SpeculationSettings(**{name: value})
    with pytest.raises(ValueError, match="runs at least 16 rows"):
        Engine(small_model(), slots=16, fixed_bucket=True, speculation=SpeculationSettings())
    transformer = Transformer(
        TransformerConfig(num_layers=1, model_dim=32, num_heads=2, ffn_hidden_dim=40, vocab_size=9),
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match="MEGALODON alone, not Transformer"):
        Engine(transformer, slots=2, max_length=8, speculation=SpeculationSettings())
