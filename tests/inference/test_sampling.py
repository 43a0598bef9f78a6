"""Draws of `draw` against the definition in `definition.py`."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megalodon_jax.inference import filters, sampling
from megalodon_jax.inference.filters import ordered_keys
from megalodon_jax.inference.sampling import (
    Drawn,
    Features,
    SamplingParams,
    SamplingState,
    draw,
    empty_state,
    sampling_row,
    token_logprobs,
)
from tests.inference import definition
from tests.inference.models import set_row

ALL = Features(True, True, True, True, True, True, 3)
jitted_draw = jax.jit(draw, static_argnums=2)
filter_mask = jax.jit(filters.filter_mask)


def state_of(requests: Sequence[SamplingParams], vocab_size: int, **options) -> SamplingState:
    """A state with one slot per request; the seed of a request without one is its slot."""
    state = empty_state(len(requests), vocab_size=vocab_size)
    for slot, params in enumerate(requests):
        row = sampling_row(params, vocab_size=vocab_size, seed=slot, **options)
        state = set_row(state, slot, row)
    return state


def many_rows(params: SamplingParams, vocab_size: int, rows: int, **options) -> SamplingState:
    """A state of equal rows with different seeds."""
    row = sampling_row(params, vocab_size=vocab_size, seed=0, **options)
    # NumPy compiles nothing.
    state = jax.tree.map(lambda x: jnp.asarray(np.tile(x, (rows, *[1] * np.ndim(x)))), row)
    seeds = jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], 1)
    return state._replace(seed=seeds)


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, vocab_size)).astype(np.float32) * 3


def test_keys_have_the_order_of_floats():
    tiny = np.finfo(np.float32).smallest_normal
    x = np.array([-np.inf, -3e38, -1.5, -1.0, -tiny, 0.0, tiny, 1.0, 3e38, np.inf], np.float32)
    keys = np.asarray(ordered_keys(jnp.asarray(x))).astype(np.int64)
    assert np.all(np.diff(keys) > 0)
    assert len(set(np.asarray(ordered_keys(jnp.array([-0.0, 0.0]))))) == 1


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 257, 32_001])
def test_top_k_keeps_the_first_k_of_a_stable_sort(vocab_size):
    ks = [0, 1, 2, 7, vocab_size - 1, vocab_size, vocab_size + 9]
    for step in (0.0, 0.5):
        # Steps of a half: most logits have ties.
        logits = random_logits(len(ks), vocab_size)
        logits = np.round(logits / step) * step if step else logits
        kept = np.asarray(filter_mask(jnp.asarray(logits), k=jnp.array(ks, jnp.int32)))
        for row, k, mask in zip(logits, ks, kept, strict=True):
            first = np.argsort(-row, kind="stable")[: k or vocab_size]
            assert np.flatnonzero(mask).tolist() == sorted(first.tolist())


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 257, 32_001])
def test_top_p_keeps_the_smallest_set_that_reaches_p(vocab_size):
    ps = np.array([1e-9, 1e-3, 0.1, 0.5, 0.9, 0.99, 0.9999, 1.0], np.float32)
    for step in (0.0, 0.5):
        logits = random_logits(len(ps), vocab_size, seed=3)
        logits = np.round(logits / step) * step if step else logits
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        kept = np.asarray(
            filter_mask(jnp.asarray(logits), weights=jnp.asarray(weights), p=jnp.asarray(ps))
        )
        for row, p, mask in zip(logits, ps, kept, strict=True):
            order = np.argsort(-row, kind="stable")
            count = int(mask.sum())
            assert np.flatnonzero(mask).tolist() == sorted(order[:count].tolist())
            if p == 1.0:
                assert count == vocab_size
                continue
            reached = np.cumsum(definition.softmax(row[order].astype(np.float64)))
            # Weights are computed, and shares compared, in float32: 4 of its roundings at 1.
            rounding = 4 * np.finfo(np.float32).eps
            assert reached[count - 1] >= float(p) - rounding
            assert count == 1 or reached[count - 2] < float(p) + rounding


def test_top_p_stops_exactly_where_p_is_reached():
    kept = filter_mask(jnp.zeros((3, 4)), weights=jnp.ones((3, 4)), p=jnp.array([0.25, 0.5, 0.75]))
    assert np.asarray(kept).sum(-1).tolist() == [1, 2, 3]
    assert np.asarray(kept)[1].tolist() == [True, True, False, False]


FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=1.7, top_k=3),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.3),
    SamplingParams(top_k=4, top_p=0.7),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.95, min_p=0.2),
    SamplingParams(top_k=1),
    SamplingParams(temperature=0.0, top_k=5),
]


@pytest.mark.parametrize("params", FILTERS, ids=range(len(FILTERS)))
def test_draws_follow_the_filtered_probabilities(params):
    logits = np.array([1.0, 0.3, -0.5, 0.3, 2.0, -3.0, 0.9], np.float32)
    rows = 40_000
    drawn = jitted_draw(np.tile(logits, (rows, 1)), many_rows(params, 7, rows), ALL)
    counts = np.bincount(np.asarray(drawn.tokens), minlength=7)
    expected = definition.probabilities(logits, params) * rows
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(counts) - 1
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square <= degrees + 4 * np.sqrt(2 * degrees)


def test_successive_draws_of_a_row_are_independent():
    rows, logits = 20_000, np.zeros((20_000, 3), np.float32)
    state = many_rows(SamplingParams(), 3, rows)
    first = jitted_draw(logits, state, Features(random=True))
    second = jitted_draw(logits, first.state, Features(random=True))
    pairs = np.bincount(np.asarray(first.tokens * 3 + second.tokens), minlength=9)
    assert np.sum((pairs - rows / 9) ** 2 / (rows / 9)) <= 8 + 4 * 4


@pytest.mark.slow
def test_improbable_tokens_are_drawn_as_often_as_they_should_be():
    # All tokens but one have a probability of 2e-5: the upper tail of the noise decides.
    rows, vocab_size = 4_000, 257
    logits = np.full((rows, vocab_size), np.log(2e-5), np.float32)
    logits[:, 5] = np.log1p(-256 * 2e-5)
    drawn = jitted_draw(logits, many_rows(SamplingParams(), vocab_size, rows), ALL)
    others = int(np.sum(np.asarray(drawn.tokens) != 5))
    expected = rows * 256 * 2e-5
    assert abs(others - expected) < 4 * np.sqrt(expected)


PENALTIES = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repetition_penalty=1.7),
    SamplingParams(temperature=0.0, presence_penalty=1.5),
    SamplingParams(temperature=0.0, frequency_penalty=0.4),
    SamplingParams(temperature=0.0, frequency_penalty=-0.7, repetition_penalty=0.8),
    SamplingParams(
        temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25,
        logit_bias={3: 2.5, 11: -100.0},
    ),
]  # fmt: skip


def test_penalties_of_prompt_and_output_against_a_loop():
    vocab_size, steps = 17, 40
    prompts = [[1, 4, 4], [16, 2], [0], [5, 6, 7], [9], [3, 3, 12]]
    state = empty_state(len(PENALTIES), vocab_size=vocab_size)
    for slot, (params, prompt) in enumerate(zip(PENALTIES, prompts, strict=True)):
        row = sampling_row(params, vocab_size=vocab_size, prompt=prompt)
        state = set_row(state, slot, row)
    outputs: list[list[int]] = [[] for _ in PENALTIES]
    # Few distinct logits a row, so that penalties decide.
    base = random_logits(len(PENALTIES), vocab_size)
    for step in range(steps):
        logits = base + random_logits(len(PENALTIES), vocab_size, seed=step + 1) / 8
        drawn = jitted_draw(logits, state, ALL)
        state = drawn.state
        for slot, params in enumerate(PENALTIES):
            x = definition.penalized(logits[slot], params, prompts[slot], outputs[slot])
            assert int(drawn.tokens[slot]) == x.argmax()
            outputs[slot].append(int(drawn.tokens[slot]))
    assert len(set(outputs[0])) < len(set(outputs[3]))
    np.testing.assert_array_equal(state.position, steps)


def test_penalties_come_before_the_filters():
    vocab_size, rows = 7, 2_000
    params = SamplingParams(top_k=2, logit_bias={0: 20.0}, repetition_penalty=4.0)
    state = many_rows(params, vocab_size, rows, prompt=[6])
    logits = np.array([0, 1, 2, 3, 4, 5, 6], np.float32)
    expected = definition.probabilities(definition.penalized(logits, params, [6], []), params)
    drawn = jitted_draw(np.tile(logits, (rows, 1)), state, ALL)
    assert set(np.asarray(drawn.tokens).tolist()) <= set(np.flatnonzero(expected))


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.3, top_p=0.9),
    SamplingParams(top_k=40, repetition_penalty=1.2),
    SamplingParams(min_p=0.05, logit_bias={3: 4.0}),
    SamplingParams(temperature=2.0, top_k=9, top_p=0.5, frequency_penalty=1.0, logprobs=2),
    SamplingParams(presence_penalty=-1.0),
    SamplingParams(temperature=0.7),
]
VARIANTS = [
    Features(random=True),
    Features(random=True, top_k=True),
    Features(random=True, top_p=True),
    Features(random=True, min_p=True, bias=True),
    Features(random=True, penalties=True, logprobs=0),
    Features(random=True, top_k=True, penalties=True),
    Features(random=True, top_k=True, top_p=True, logprobs=5),
    ALL,
]


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [257, 32_001])
def test_scores_have_the_same_bits_with_features_that_a_row_does_not_use(vocab_size):
    # Tokens alone would hide a last bit that differs: it decides one draw of a million.
    requests = [dataclasses.replace(params, seed=i) for i, params in enumerate(MIXED)]
    state = state_of(requests, vocab_size, prompt=[3])
    state = jitted_draw(random_logits(8, vocab_size, seed=1), state, ALL).state
    logits = random_logits(8, vocab_size)
    # The private function: scores are what must not differ, and `draw` returns their argmax only.
    scores = jax.jit(
        lambda state, features: sampling._scores(logits, state, features, None)[0], static_argnums=1
    )
    expected = np.asarray(scores(state, ALL))
    for features in VARIANTS[:-1]:
        covered = [features.covers(Features.of(params)) for params in requests]
        variant = np.asarray(scores(state, features))
        np.testing.assert_array_equal(variant[covered], expected[covered])


@pytest.mark.slow
@pytest.mark.parametrize(("vocab_size", "rows"), [(257, 1_001), (32_001, 9)])
def test_rows_draw_the_same_tokens_with_features_that_they_do_not_use(vocab_size, rows):
    requests = [dataclasses.replace(MIXED[i % 8], seed=i) for i in range(rows)]
    row_arrays = [sampling_row(params, vocab_size=vocab_size) for params in requests]
    state = jax.tree.map(lambda *x: jnp.stack(x), *row_arrays)
    logits = random_logits(rows, vocab_size)
    tokens = np.asarray(jitted_draw(logits, state, ALL).tokens)
    used = np.zeros(rows, bool)
    for features in VARIANTS:
        covered = np.array([features.covers(Features.of(params)) for params in requests])
        variant = np.asarray(jitted_draw(logits, state, features).tokens)
        np.testing.assert_array_equal(variant[covered], tokens[covered])
        used |= covered
    assert used.all()
    greedy = np.asarray(jitted_draw(logits, state, Features()).tokens)
    np.testing.assert_array_equal(greedy[1::8], tokens[1::8])


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [257, 32_001])
def test_a_rows_tokens_do_not_depend_on_slot_neighbours_and_batch_size(vocab_size):
    logits = random_logits(8, vocab_size)
    requests = [dataclasses.replace(params, seed=100 + i) for i, params in enumerate(MIXED)]

    def tokens_of(slots: Sequence[int]) -> list:
        state = state_of([requests[i] for i in slots], vocab_size, prompt=[3, 5])
        found = []
        for step in range(3):
            drawn = jitted_draw(np.roll(logits, step, axis=1)[list(slots)], state, ALL)
            state = drawn.state
            found.append(np.asarray(drawn.tokens).tolist())
        return np.asarray(found).T.tolist()

    together = tokens_of(range(8))
    for slots in ([5], [2, 4], [7, 6, 5, 4, 3, 2, 1, 0], [3, 3, 0]):
        assert tokens_of(slots) == [together[i] for i in slots]


def test_nothing_compiles_when_values_change():
    vocab_size = 33

    # New functions: `jax.jit` of the same function shares its cache with other tests.
    @jax.jit
    def counted(logits, state, masks, active):
        return draw(logits, state, ALL, logits_mask=masks, active=active).state

    state = empty_state(4, vocab_size=vocab_size)
    masks = -np.ones((4, 2), np.int32)
    for i, params in enumerate(MIXED):
        row = sampling_row(params, vocab_size=vocab_size, seed=2**40 + i, prompt=[i] * i)
        state = set_row(state, i % 4, row)
        logits = random_logits(4, vocab_size, seed=i)
        state = counted(logits, state, masks + 2 * i, masks[:, 0] < i)
    assert counted._cache_size() == 1


@pytest.mark.slow
def test_draws_in_a_scan_equal_single_draws():
    state = state_of(MIXED, 257, prompt=[9])
    logits = np.stack([random_logits(8, 257, seed=i) for i in range(5)])

    @jax.jit
    def scanned(state: SamplingState) -> jax.Array:
        def step(state: SamplingState, logits: jax.Array) -> tuple[SamplingState, jax.Array]:
            drawn = draw(logits, state, ALL)
            return drawn.state, drawn.tokens

        return jax.lax.scan(step, state, logits)[1]

    for step, tokens in enumerate(np.asarray(scanned(state))):
        drawn = jitted_draw(logits[step], state, ALL)
        np.testing.assert_array_equal(tokens, drawn.tokens)
        state = drawn.state


@pytest.mark.slow
def test_a_vmapped_draw_equals_single_draws():
    state = state_of(MIXED[2:6], 257, prompt=[9])
    logits = random_logits(12, 257).reshape(3, 4, 257)
    drawn = jax.jit(jax.vmap(lambda x: draw(x, state, ALL)))(logits)
    for i in range(3):
        np.testing.assert_array_equal(drawn.tokens[i], jitted_draw(logits[i], state, ALL).tokens)


def test_log_probabilities_are_the_models():
    vocab_size, num_tokens = 257, 250
    requests = [dataclasses.replace(p, logit_bias={1: 50.0}, temperature=0.2) for p in MIXED]
    state = state_of(requests, vocab_size, num_tokens=num_tokens, prompt=[1])
    logits = random_logits(8, vocab_size)
    logits[:, num_tokens:] += 30
    logits[0, [20, 7]] = 40.0
    drawn: Drawn = jitted_draw(logits, state, ALL)
    for row, token, ids, of_token, of_top in zip(
        logits[:, :num_tokens], drawn.tokens, drawn.logprobs.top_ids, drawn.logprobs.token,
        drawn.logprobs.top, strict=True,
    ):  # fmt: skip
        expected = np.log(definition.softmax(row.astype(np.float64)))
        np.testing.assert_allclose(of_token, expected[token], atol=1e-5)
        first = np.argsort(-expected, kind="stable")[:3]
        np.testing.assert_array_equal(ids, first)
        np.testing.assert_allclose(of_top, expected[first], atol=1e-5)
    without = jitted_draw(logits, state, ALL._replace(logprobs=None))
    assert np.isnan(without.logprobs.token).all()
    assert without.logprobs.top_ids.shape == (8, 0)


def test_log_probabilities_of_a_prompt():
    logits, tokens = random_logits(6, 257).reshape(2, 3, 257), np.array([[1, 2, 3], [256, 0, 9]])
    found = token_logprobs(logits, tokens, 2)
    assert found.top_ids.shape == (2, 3, 2)
    expected = np.log(definition.softmax(logits[1, 0].astype(np.float64)))[256]
    np.testing.assert_allclose(found.token[1, 0], expected, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 257])
def test_only_tokens_of_the_mask_are_drawn(vocab_size):
    words, rows = -(-vocab_size // 32), 64
    rng = np.random.default_rng(0)
    allowed = rng.random((rows, words * 32)) < 0.2
    allowed[np.arange(rows), rng.integers(0, vocab_size, rows)] = True
    packed = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    # The last row has no mask.
    packed[-1], allowed[-1] = -1, True
    allowed = allowed[:, :vocab_size]
    logits = random_logits(rows, vocab_size)
    masked = partial(jitted_draw, logits, logits_mask=packed)
    greedy = masked(many_rows(SamplingParams(temperature=0.0), vocab_size, rows), Features())
    expected = np.where(allowed, logits, -np.inf).argmax(-1)
    np.testing.assert_array_equal(greedy.tokens, expected)
    state = many_rows(SamplingParams(top_p=0.9, logit_bias={0: 9.0}), vocab_size, rows)
    features = ALL._replace(logprobs=None)
    for _ in range(5):
        drawn = masked(state, features)
        assert allowed[np.arange(rows), drawn.tokens].all()
        assert drawn.valid.all()
        state = drawn.state
    with pytest.raises(ValueError, match=f"{words + 1} words"):
        masked(state, features, logits_mask=np.zeros((rows, words + 1), np.int32))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_rows_are_named_and_break_no_other(temperature):
    params = SamplingParams(temperature=temperature, top_k=20, top_p=0.9, min_p=0.01)
    state = many_rows(params, 257, 8)
    logits = random_logits(8, 257)
    whole = np.asarray(jitted_draw(logits, state, ALL).tokens)
    broken = logits.copy()
    broken[1] = np.nan
    broken[3] = -np.inf
    broken[5, 17] = np.nan
    broken[6, 4] = np.inf
    drawn = jitted_draw(broken, state, ALL)
    assert np.asarray(drawn.valid).tolist() == [True, False, True, False, True, False, True, True]
    tokens = np.asarray(drawn.tokens)
    assert tokens[[1, 3, 6]].tolist() == [0, 0, 4]
    assert tokens[5] != 17
    np.testing.assert_array_equal(tokens[[0, 2, 4, 7]], whole[[0, 2, 4, 7]])


def test_extreme_settings_draw_the_most_probable_token():
    logits = random_logits(6, 257) * 1e4
    requests = [
        SamplingParams(temperature=1e-30),
        SamplingParams(temperature=1e-3, logit_bias={4: 3e38}),
        SamplingParams(top_p=1e-30),
        SamplingParams(min_p=1.0),
        SamplingParams(top_k=1, temperature=3e38),
        SamplingParams(temperature=1e-5, top_k=5, top_p=0.5, min_p=0.1),
    ]
    drawn = jitted_draw(logits, state_of(requests, 257), ALL)
    expected = logits.argmax(-1)
    expected[1] = 4
    np.testing.assert_array_equal(drawn.tokens, expected)


def test_rows_that_are_not_active_do_not_advance():
    state = state_of(MIXED, 257)
    active = np.arange(8) % 3 == 0
    advanced = jitted_draw(random_logits(8, 257), state, ALL, active=active).state
    np.testing.assert_array_equal(advanced.position, active.astype(int))
    np.testing.assert_array_equal(np.asarray(advanced.counts).sum(-1), active.astype(int))
