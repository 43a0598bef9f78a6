"""Draws of several positions, for speculation, against single draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megalodon_jax.inference.sampling import (
    Features,
    SamplingParams,
    draw,
    draw_positions,
    empty_state,
    sampling_row,
)
from tests.inference.models import set_row

V = 257
REQUESTS = [
    SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.5),
    SamplingParams(temperature=0.0, repetition_penalty=1.5),
    SamplingParams(top_k=12, presence_penalty=2.0, repetition_penalty=1.2),
    SamplingParams(min_p=0.1),
]
ALL = Features(True, True, True, True, True, True, 2)
single = jax.jit(draw, static_argnums=2)
several = jax.jit(draw_positions, static_argnums=3)


@pytest.fixture
def state():
    state = empty_state(4, vocab_size=V)
    for slot, params in enumerate(REQUESTS):
        row = sampling_row(params, vocab_size=V, prompt=[4, 7], seed=slot)
        state = set_row(state, slot, row)
    return state


def logits_after(tokens: np.ndarray) -> np.ndarray:
    """Logits of a model that reads the last token of each row, (B,) to (B, V)."""
    table = np.random.default_rng(1).normal(size=(V, V)).astype(np.float32)
    # A few probable tokens, so that tokens repeat and penalties matter.
    table[:, :6] += 4
    return table[np.clip(tokens, 0, V - 1)]


def decode(state, steps: int):
    tokens = [np.zeros(4, np.int64)]
    drawn = []
    for _ in range(steps):
        drawn.append(single(logits_after(tokens[-1]), state, ALL))
        state = drawn[-1].state
        tokens.append(np.asarray(drawn[-1].tokens))
    return np.stack(tokens[1:], axis=1), drawn, state


def test_right_drafts_are_all_accepted(state):
    tokens, drawn, after = decode(state, 4)
    logits = np.stack([logits_after(t) for t in np.c_[np.zeros(4, int), tokens[:, :3]].T], axis=1)
    found = several(logits, tokens[:, :3], state, ALL)
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_array_equal(found.accepted, 4)
    jax.tree.map(np.testing.assert_array_equal, found.state, after)
    for i in range(4):
        np.testing.assert_allclose(found.logprobs.top[:, i], drawn[i].logprobs.top, atol=1e-6)
        np.testing.assert_array_equal(found.logprobs.top_ids[:, i], drawn[i].logprobs.top_ids)


def test_speculation_gives_the_tokens_of_plain_decoding(state):
    expected, _, _ = decode(state, 30)
    rng = np.random.default_rng(0)
    outputs: list[list[int]] = [[] for _ in REQUESTS]
    accepted = []
    while min(map(len, outputs)) < 20:
        # Drafts that are sometimes right; -1 has no draft. All rows keep to their own pace.
        drafts = np.array([expected[b, len(o) :][:3] for b, o in enumerate(outputs)])
        wrong = rng.random(drafts.shape) < 0.3
        drafts = np.where(wrong, rng.choice([-1, 0, 3, 200], drafts.shape), drafts)
        last = np.array([o[-1] if o else 0 for o in outputs])
        logits = np.stack([logits_after(t) for t in np.c_[last, drafts].T], axis=1)
        active = np.array([len(o) < 20 for o in outputs])
        found = several(logits, drafts, state, ALL, active=active)
        state = found.state
        for b in np.flatnonzero(active):
            n = int(found.accepted[b])
            accepted.append(n)
            outputs[b] += np.asarray(found.tokens)[b, :n].tolist()
        np.testing.assert_array_equal(state.position, [len(o) for o in outputs])
    assert set(accepted) == {1, 2, 3, 4}
    for b, output in enumerate(outputs):
        assert output == expected[b, : len(output)].tolist()
        np.testing.assert_array_equal(state.counts[b], np.bincount(output, minlength=V))


def test_a_mask_per_position(state):
    logits = np.zeros((4, 2, V), np.float32)
    masks = np.zeros((4, 2, 9), np.int32)
    masks[:, 0, 1] = 1 << 3
    masks[:, 1, 8] = 1
    found = several(logits, np.full((4, 1), 35), state, ALL, logits_mask=masks)
    np.testing.assert_array_equal(found.tokens, [[35, 256]] * 4)
    np.testing.assert_array_equal(found.accepted, 2)


def test_a_part_of_the_rows_draws_what_it_draws_among_all(state):
    slots = jnp.array([2, 0])
    logits = logits_after(np.array([1, 2, 3, 4]))
    whole = single(logits, state, ALL)
    part = single(logits[np.asarray(slots)], jax.tree.map(lambda x: x[slots], state), ALL)
    np.testing.assert_array_equal(part.tokens, whole.tokens[slots])
    np.testing.assert_array_equal(part.state.counts, whole.state.counts[slots])
