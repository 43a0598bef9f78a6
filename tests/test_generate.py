"""Sampling, and generation with the cache against full calls of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.config import ModelConfig
from megalodon_jax.data import ByteTokenizer
from megalodon_jax.generate import (
    Sampling,
    generate,
    sample,
    stream,
    stream_text,
    top_k_filter,
    top_p_filter,
)
from megalodon_jax.model import Megalodon

P = np.array([0.5, 0.25, 0.15, 0.1])
PROMPTS = np.array([[5, 3, 9, 1, 2], [7, 7, 4, 0, 0], [1, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([5, 3, 1], np.int32)


@pytest.fixture(scope="module")
def model() -> Megalodon:
    config = ModelConfig(
        num_layers=1, model_dim=8, z_dim=4, value_dim=8, num_heads=1, ffn_hidden_dim=8,
        cema_ndim=2, chunk_size=8, vocab_size=257, norm_num_groups=2,
    )  # fmt: skip
    return Megalodon(config, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def full_logits(model):
    """Logits of complete sequences in one call, padded to one compiled shape of (3, 48)."""
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).logits)

    def run(tokens: np.ndarray) -> np.ndarray:
        rows, length = tokens.shape
        padded = np.pad(tokens, ((0, 3 - rows), (0, 48 - length)))
        return np.asarray(call(state, padded))[:rows, :length]

    return run


def remaining(logits) -> list[list[int]]:
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(logits)]


def test_top_k_leaves_exactly_k_and_prefers_lower_ids():
    logits = jnp.array([[1.0, 3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert remaining(top_k_filter(logits, 2)) == [[1, 2], [0, 1]]
    assert remaining(top_k_filter(logits, 9)) == [[0, 1, 2, 3]] * 2
    np.testing.assert_array_equal(np.asarray(top_k_filter(logits, 2))[0, 1:3], [3.0, 2.0])


@pytest.mark.parametrize(
    ("p", "count"), [(1e-6, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.95, 4), (1.0, 4)]
)
def test_top_p_leaves_the_smallest_set_that_reaches_p(p, count):
    order = np.array([2, 0, 3, 1])
    logits = jnp.log(jnp.asarray(P[np.argsort(order)]))[None] + 5.0
    assert remaining(top_p_filter(logits, p)) == [sorted(order[:count].tolist())]


def test_top_p_stops_exactly_where_p_is_reached():
    assert remaining(top_p_filter(jnp.zeros((1, 4)), 0.5)) == [[0, 1]]


def test_samples_follow_the_filtered_probabilities():
    logits = jnp.tile(jnp.log(jnp.asarray(P)), (20_000, 1))
    key = jax.random.key(0)
    for sampling, expected in (
        (Sampling(), P),
        (Sampling(temperature=0.5), P**2 / np.sum(P**2)),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_k=3, top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(temperature=0.0), [1, 0, 0, 0]),
    ):
        counts = np.bincount(np.asarray(sample(logits, key, sampling)), minlength=4)
        np.testing.assert_allclose(counts / counts.sum(), expected, atol=0.015)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}]
)
def test_settings_out_of_range_are_rejected(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_greedy_decoding_equals_the_argmax_of_full_calls(model, full_logits):
    new = generate(model, PROMPTS, LENGTHS, max_tokens=37, temperature=0.0)
    assert new.shape == (3, 37)
    for prompt, length, row in zip(PROMPTS, LENGTHS, new, strict=True):
        whole = np.concatenate([prompt[:length], row])
        logits = full_logits(whole[None])[0]
        np.testing.assert_array_equal(logits[length - 1 : len(whole) - 1].argmax(-1), row)


def test_rows_are_independent_of_other_rows_and_of_padding(model):
    batched = generate(model, PROMPTS, LENGTHS, max_tokens=8, temperature=0.0)
    single = generate(model, PROMPTS[1:2, :3], max_tokens=8, temperature=0.0)
    np.testing.assert_array_equal(single[0], batched[1])
    garbage = np.where(np.arange(5) < LENGTHS[:, None], PROMPTS, 10_000)
    padded = generate(model, garbage, LENGTHS, max_tokens=8, temperature=0.0)
    np.testing.assert_array_equal(padded, batched)


def test_prompts_longer_than_a_piece(model, full_logits):
    prompts = np.random.default_rng(0).integers(0, 257, (3, 21)).astype(np.int32)
    lengths = np.array([21, 8, 1], np.int32)
    new = generate(model, prompts, lengths, max_tokens=1, temperature=0.0)
    logits = full_logits(prompts)
    assert new[:, 0].tolist() == logits[np.arange(3), lengths - 1].argmax(-1).tolist()


def test_sampling_is_reproducible_and_limited_to_the_tokenizers_ids(model):
    def run(seed: int) -> np.ndarray:
        return generate(
            model, PROMPTS, LENGTHS, max_tokens=20, key=jax.random.key(seed), num_tokens=9
        )

    first = run(0)
    np.testing.assert_array_equal(first, run(0))
    assert not np.array_equal(first, run(1))
    assert first.max() < 9
    with pytest.raises(ValueError, match="needs a key"):
        generate(model, PROMPTS, LENGTHS, max_tokens=1)


def test_a_row_ends_after_its_stop_token(model):
    free = generate(model, PROMPTS, LENGTHS, max_tokens=40, temperature=0.0)
    stop = int(free[0, 3])
    ended = generate(model, PROMPTS, LENGTHS, max_tokens=40, temperature=0.0, stop_token=stop)
    for before, after in zip(free, ended, strict=True):
        stops = np.flatnonzero(before == stop)
        end = stops[0] + 1 if len(stops) else len(after)
        np.testing.assert_array_equal(after[:end], before[: len(after[:end])])
        assert (after[end:] == stop).all()


def test_streaming_yields_the_same_tokens(model):
    blocks = list(
        stream(model, PROMPTS, LENGTHS, max_tokens=40, sampling=Sampling(temperature=0.0))
    )
    assert len(blocks) > 1
    whole = generate(model, PROMPTS, LENGTHS, max_tokens=40, temperature=0.0)
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole)
    assert generate(model, PROMPTS, LENGTHS, max_tokens=0, temperature=0.0).shape == (3, 0)


def test_streamed_text_is_the_decoded_tokens(model):
    tokenizer = ByteTokenizer()
    tokens = np.array([[256, *"né".encode()]], np.int32)
    greedy = Sampling(temperature=0.0)
    new = generate(model, tokens, max_tokens=40, temperature=0.0, stop_token=256, num_tokens=257)[
        0
    ].tolist()
    expected = tokenizer.decode(new[: new.index(256)] if 256 in new else new)
    text = "".join(stream_text(model, tokenizer, "né", max_tokens=40, sampling=greedy))
    assert text == expected


@pytest.mark.parametrize(
    ("prompts", "lengths", "message"),
    [
        (PROMPTS, [5, 3, 0], "from 0 to 5; use 1 to 5"),
        (PROMPTS, [5, 3], r"lengths have shape \(2,\)"),
        (PROMPTS[0], None, r"prompts have shape \(5,\)"),
        (np.array([[257]]), None, "0 to 256"),
    ],
)
def test_invalid_prompts_are_rejected(model, prompts, lengths, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, lengths, max_tokens=1, temperature=0.0)
