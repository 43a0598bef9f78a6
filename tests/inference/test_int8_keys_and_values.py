"""Decoding with `kv="int8"`: steps, the engine, sessions, speculation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.cache import kv_format
from megalodon_jax.config import TransformerConfig
from megalodon_jax.errors import SessionError
from megalodon_jax.inference import positions, sharded_operations, step
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling import SamplingParams
from megalodon_jax.inference.speculation import SpeculationSettings
from megalodon_jax.inference.weights import prepare
from pallas_kernels.chunk_decode import chunk_decode
from pallas_kernels.common.int8 import quantize
from tests.golden_files import relative_error
from tests.inference.models import CHUNK, CONFIG, random_prompt
from tests.model.conftest import perturbed

GREEDY = SamplingParams(temperature=0.0, max_tokens=CHUNK + 5)
PROMPTS = [random_prompt(length, length) for length in (3, CHUNK, 2 * CHUNK + 5, 21, 1)]
B, LENGTH = 2, 2 * CHUNK + 3


@functools.cache
def model_of_one_layer():
    return perturbed(dataclasses.replace(CONFIG, num_layers=1))


@functools.cache
def weights():
    return jax.jit(prepare)(model_of_one_layer())


def scores(kv: str, decode=step.decode):
    """Scores of B rows over more than two chunks, and the cache after them."""
    tokens = np.stack([random_prompt(LENGTH, seed) for seed in range(B)])

    @jax.jit
    def run(weights, tokens):
        def feed(cache, tokens):
            logits, cache = decode(weights, cache, tokens)
            return cache, logits

        return jax.lax.scan(feed, model_of_one_layer().init_cache(B + 1, kv=kv), tokens)

    cache, logits = run(weights(), jnp.asarray(tokens.T))
    return logits, cache


@pytest.mark.slow
def test_steps_are_those_of_keys_and_values_rounded_beforehand(monkeypatch):
    """A cache of float32 in which every key and value is rounded before it is written."""

    def rounding(shared, _, v, cache, position, **options):
        q, k = shared.queries_and_keys(v.dtype)
        k, v = (each.values * each.scale[..., None] for each in map(quantize, (k, v)))
        return chunk_decode(q, k, v, cache, position, **options)

    logits, cache = scores("int8")
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers[0].keys_and_values)} == {
        jnp.dtype(jnp.int8),
        jnp.dtype(jnp.float32),
    }
    monkeypatch.setattr(sharded_operations, "chunk_decode", rounding)
    expected, expected_cache = scores("model")
    assert relative_error(logits, expected) <= 1e-5
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        decoded = layer.keys_and_values.decode(jnp.float32, jnp.float32)
        for slots, others in zip(decoded, other.keys_and_values, strict=True):
            assert relative_error(slots[:B], others[:B]) <= 1e-5


@pytest.mark.slow
def test_several_positions_at_once_are_the_steps():
    tokens = random_prompt(2 * 5).reshape(2, 5)
    cache = model_of_one_layer().init_cache(3, kv="int8")
    feed = jax.jit(step.decode)
    for token in random_prompt(2 * 4, 1).reshape(4, 2):
        cache = feed(weights(), cache, token).cache
    out = jax.jit(positions.decode_positions)(weights(), cache, tokens)
    stepped = cache
    for t in range(5):
        logits, stepped = feed(weights(), stepped, tokens[:, t])
        assert relative_error(out.logits[:, t], logits) <= 1e-5
    for mine, theirs in zip(out.cache.layers, stepped.layers, strict=True):
        for slots, others in zip(
            mine.keys_and_values.decode(jnp.float32, jnp.float32),
            theirs.keys_and_values.decode(jnp.float32, jnp.float32),
            strict=True,
        ):
            assert relative_error(slots, others) <= 1e-5


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(model_of_one_layer(), slots=4, kv="int8", prefix_cache_bytes=1 << 20)


def run(engine: Engine, prompt, params=GREEDY, **options) -> Any:
    stream = engine.submit(Request(prompt=prompt, params=params, **options))
    engine.run()
    return stream


@pytest.mark.slow
def test_tokens_do_not_depend_on_slots_neighbours_and_buckets(engine):
    alone = [run(engine, prompt).tokens for prompt in PROMPTS]
    together = [engine.submit(Request(prompt=prompt, params=GREEDY)) for prompt in PROMPTS]
    engine.run()
    assert [each.tokens for each in together] == alone
    samples = engine.submit_samples(Request(prompt=PROMPTS[0], params=GREEDY), 2)
    engine.run()
    assert [each.tokens for each in samples] == alone[:1] * 2


@pytest.mark.slow
def test_a_known_prefix_changes_nothing(engine):
    prompt = random_prompt(3 * CHUNK + 4, 8)
    cold, warm = run(engine, prompt), run(engine, prompt)
    assert engine._prefiller.prefixes.longest(prompt) == 3 * CHUNK
    assert cold.tokens == warm.tokens


@pytest.mark.slow
def test_a_session_goes_on_bit_for_bit(engine, tmp_path):
    """From memory and from a file, inside a chunk, by a prompt and by the next drawn token."""
    session = run(engine, PROMPTS[3], keep_session=True).session
    session.save(tmp_path / "talk.session")
    loaded = engine.load_session(tmp_path / "talk.session")
    for mine, theirs in zip(
        jax.tree.leaves(session.cache), jax.tree.leaves(loaded.cache), strict=True
    ):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    continued = [
        run(engine, random_prompt(7), session=each, keep_session=True) for each in (session, loaded)
    ]
    assert continued[0].tokens == continued[1].tokens
    for mine, theirs in zip(
        *(jax.tree.leaves(each.session.cache) for each in continued), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    filled = session.cache.layers[0].keys_and_values.key
    assert filled.shape[2] == (session.num_tokens - 1) % CHUNK == filled.scale.shape[2]


@pytest.mark.slow
def test_sessions_of_the_other_format_are_refused(engine, tmp_path):
    other = Engine(model_of_one_layer(), slots=2)
    for mine, theirs in ((engine, other), (other, engine)):
        formats = [each._prefiller.kv for each in (mine, theirs)]
        message = f"in the format '{formats[0]}', the engine in '{formats[1]}'; use an engine with"
        session = run(mine, PROMPTS[0], keep_session=True).session
        assert kv_format(session.cache) == mine._prefiller.kv
        with pytest.raises(SessionError, match=message):
            theirs.submit(Request(prompt=(1,), session=session))
        session.save(tmp_path / "talk.session")
        with pytest.raises(SessionError, match=f"talk.session has keys and values {message}"):
            theirs.load_session(tmp_path / "talk.session")


@pytest.mark.slow
def test_speculation_draws_the_same_tokens(engine):
    settings = SpeculationSettings(max_rows=2, window=64)
    fast = Engine(model_of_one_layer(), slots=4, kv="int8", speculation=settings)
    prompt = np.resize(random_prompt(7), 40)
    params = dataclasses.replace(GREEDY, max_tokens=2 * CHUNK + 3)
    assert run(fast, prompt, params).tokens == run(engine, prompt, params).tokens
    assert fast.acceptance > 0


@pytest.mark.slow
def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="kv is 'int4'; use 'model' or 'int8'"):
        Engine(model_of_one_layer(), slots=2, kv="int4")
    config = TransformerConfig(
        num_layers=1, model_dim=32, num_heads=2, ffn_hidden_dim=40, vocab_size=9
    )
    transformer = Transformer(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="kv is 'int8', but a Transformer decodes with 'model'"):
        Engine(transformer, slots=2, max_length=8, kv="int8")
