"""Models that decode by their own call: the Transformer in the engine."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax import Transformer, TransformerConfig
from megalodon_jax.errors import RequestError
from megalodon_jax.inference.blocks import decode_block, empty_slots
from megalodon_jax.inference.decoders import ModelWeights, prepare_decoding
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling import Features, SamplingParams, empty_state

CONFIG = TransformerConfig(
    num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, ffn_hidden_dim=48, vocab_size=62,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=9)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_the_engine_gives_the_tokens_of_full_passes(model):
    engine = Engine(model, slots=3, max_length=64)
    prompts = [np.arange(1, 1 + length) * 7 % 62 for length in (3, 40, 17, 1)]
    streams = [engine.submit(Request(prompt=prompt, params=GREEDY)) for prompt in prompts]
    engine.run()
    full = nnx.jit(lambda model, tokens: model(tokens).logits)
    for prompt, stream in zip(prompts, streams, strict=True):
        tokens = prompt.tolist()
        for _ in range(GREEDY.max_tokens):
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(np.argmax(full(model, padded)[0, len(tokens) - 1])))
        assert stream.tokens == tokens[len(prompt) :]


def test_what_the_transformer_lacks_is_refused(model):
    engine = Engine(model, slots=2, max_length=64)
    with pytest.raises(RequestError, match="exceed the engine's max_length 64"):
        engine.submit(Request(prompt=[1] * 60, params=GREEDY))
    with pytest.raises(ValueError, match="a Transformer decodes with 'model' alone"):
        Engine(model, slots=2, max_length=64, weights="int8")
    with pytest.raises(ValueError, match="only MEGALODON has states at chunk borders"):
        Engine(model, slots=2, max_length=64, prefix_cache_bytes=100)


@pytest.mark.slow
def test_weights_are_the_models_and_no_step_slices_a_stack(model):
    tokens = np.arange(12, dtype=np.int32)[None]
    weights = jax.jit(prepare_decoding)(model)
    assert isinstance(weights, ModelWeights)
    assert len(weights.layers) == CONFIG.num_layers
    np.testing.assert_array_equal(model(tokens).logits, weights.model()(tokens).logits)
    slots = empty_slots(model.init_cache(2, max_length=64), empty_state(2, vocab_size=62))
    text = decode_block.lower(weights, slots, 2, 4, Features(), None).compile().as_text()
    assert text is not None
    assert not re.search(r"= f32\[3,32,\d+\]", text)
