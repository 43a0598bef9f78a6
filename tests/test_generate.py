"""Generation in one call against full calls of the model; no second compilation."""

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.config import ModelConfig
from megalodon_jax.data import ByteTokenizer
from megalodon_jax.generate import generate, generate_text, stream, stream_text
from megalodon_jax.inference.sampling import SamplingParams
from megalodon_jax.model import Megalodon

PROMPTS = np.array([[5, 3, 9, 1, 2], [7, 7, 4, 0, 0], [1, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([5, 3, 1], np.int32)


@pytest.fixture(scope="module")
def model() -> Megalodon:
    config = ModelConfig(
        num_layers=1, model_dim=8, z_dim=4, value_dim=8, num_heads=1, ffn_hidden_dim=8,
        cema_ndim=2, chunk_size=8, vocab_size=257, norm_num_groups=2, implementation="reference",
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


@pytest.mark.slow
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
    greedy = SamplingParams(temperature=0.0)
    blocks = list(stream(model, PROMPTS, LENGTHS, max_tokens=40, sampling=greedy))
    assert len(blocks) > 1
    whole = generate(model, PROMPTS, LENGTHS, max_tokens=40, temperature=0.0)
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole)
    assert generate(model, PROMPTS, LENGTHS, max_tokens=0, temperature=0.0).shape == (3, 0)


@pytest.mark.slow
def test_a_rows_draws_depend_on_the_key_and_its_index(model):
    key = jax.random.key(3)
    rows = generate(model, PROMPTS, LENGTHS, max_tokens=12, key=key)
    fewer = generate(model, PROMPTS[:2], LENGTHS[:2], max_tokens=12, key=key)
    np.testing.assert_array_equal(fewer, rows[:2])
    same = generate(model, np.tile(PROMPTS[:1], (3, 1)), max_tokens=12, key=key)
    assert len(np.unique(same, axis=0)) == 3


def test_a_second_call_compiles_nothing(model):
    """Other sampling parameters, and other lengths in one bucket of prompts, change no program."""
    generate(model, PROMPTS, LENGTHS, max_tokens=30, key=jax.random.key(0))
    compiled = []

    def record(name: str, seconds: float, **_) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        generate(
            model, PROMPTS[:, :4], np.minimum(LENGTHS, 4), max_tokens=27, key=jax.random.key(1),
            temperature=0.3, top_k=7, top_p=0.9, stop_token=3, num_tokens=100,
        )  # fmt: skip
        assert not compiled
        jax.jit(lambda x: x + 1)(1.0)
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(record)


def test_streamed_text_is_the_decoded_tokens(model):
    tokenizer = ByteTokenizer()
    tokens = np.array([[256, *"né".encode()]], np.int32)
    greedy = SamplingParams(temperature=0.0)
    new = generate(model, tokens, max_tokens=40, temperature=0.0, stop_token=256, num_tokens=257)[
        0
    ].tolist()
    expected = tokenizer.decode(new[: new.index(256)] if 256 in new else new)
    text = "".join(stream_text(model, tokenizer, "né", max_tokens=40, sampling=greedy))
    assert text == expected


@pytest.mark.slow
def test_completions_of_texts(model):
    tokenizer = ByteTokenizer()
    greedy = SamplingParams(temperature=0.0, max_tokens=40, logprobs=2)
    completions = generate_text(model, tokenizer, ["né", "abc", ""], greedy)
    assert len(completions) == 3
    plain = SamplingParams(temperature=0.0)
    text = "".join(stream_text(model, tokenizer, "né", max_tokens=40, sampling=plain))
    assert completions[0].text == text
    for each in completions:
        assert tokenizer.decode(each.tokens) == each.text
        assert len(each.logprobs) == len(each.tokens)
        assert (each.finish_reason == "length") == (len(each.tokens) == 40)
        # A greedy token is the most probable one.
        assert all(entry.token == entry.top[0][1] for entry in each.logprobs)
    assert generate_text(model, tokenizer, [], greedy) == []


def test_samples_of_a_text_have_seeds_of_their_own(model):
    tokenizer = ByteTokenizer()
    params = SamplingParams(seed=5, max_tokens=12)
    three = generate_text(model, tokenizer, ["a"], params, n=3)
    assert len({each.tokens for each in three}) == 3
    for sample, seed in zip(three, (5, 6, 7), strict=True):
        single = SamplingParams(seed=seed, max_tokens=12)
        assert generate_text(model, tokenizer, ["a"], single) == [sample]


class AsciiTokenizer(ByteTokenizer):
    """Every id is a character: an untrained model's bytes are rarely UTF-8."""

    vocab_size = 128
    bos_id = eos_id = 0


def test_a_completion_ends_before_a_stop_text(model):
    tokenizer = AsciiTokenizer()
    free = SamplingParams(seed=1, max_tokens=40)
    (whole,) = generate_text(model, tokenizer, ["abc"], free)
    stop = whole.text[7:9]
    limited = SamplingParams(seed=1, max_tokens=40, stop=(stop, "never drawn"))
    (ended,) = generate_text(model, tokenizer, ["abc"], limited)
    assert ended.finish_reason == "stop"
    assert ended.text == whole.text[: whole.text.index(stop)]
    assert ended.tokens == whole.tokens[: len(ended.tokens)]
    assert tokenizer.decode(ended.tokens) == ended.text


def test_scores_that_are_not_numbers_are_an_error(model):
    graphdef, params = nnx.split(model)
    broken = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf * np.nan, params))
    with pytest.raises(FloatingPointError, match="row 0 are NaN after 0 new tokens"):
        generate(broken, PROMPTS, LENGTHS, max_tokens=4, temperature=0.0)
    (completion,) = generate_text(broken, ByteTokenizer(), ["a"])
    assert completion.finish_reason == "invalid"


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
