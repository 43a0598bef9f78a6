"""A prompt whose beginning is known: the slot is that of plain steps after the prefix."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from megalodon_jax.evaluation.variants import without_last_attention
from megalodon_jax.inference.blocks import empty_slots, pack_start
from megalodon_jax.inference.known_prompt import Continuation, start_known_row
from megalodon_jax.inference.sampling import Features, SamplingParams, empty_state
from megalodon_jax.inference.step import decode
from megalodon_jax.inference.weights import prepare
from tests.ablations import VARIANTS
from tests.golden_files import relative_error
from tests.inference.models import CHUNK, CONFIG, VOCAB, random_prompt
from tests.inference.test_speculation import assert_near
from tests.model.conftest import perturbed

T, SLOTS, SLOT = 7, 3, 1
# TimestepNorm and CEMA in one operation; EMA behind another norm; TimestepNorm alone, and a layer
# that keeps the prefix's states.
MODELS = ("default", "all, ema", "no average, skip_attention")


def of_row(tree, row: int):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[row], tree)


def poisoned_slots(model):
    """Slots after requests that left NaN."""
    slots = empty_slots(model.init_cache(SLOTS), empty_state(SLOTS, vocab_size=VOCAB))
    cache = jax.tree.map(
        lambda leaf: leaf * jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf + 5,
        slots.cache,
    )
    return slots._replace(cache=cache)


def without_slots(cache):
    layers = tuple(layer._replace(keys_and_values=None) for layer in cache.layers)
    return dataclasses.replace(cache, layers=layers)


@pytest.mark.slow
@pytest.mark.parametrize("variant", MODELS)
def test_a_known_prompt_equals_steps_after_the_prefix(variant: str):
    name, *skips = variant.split(", skip")
    model = perturbed(dataclasses.replace(CONFIG, **VARIANTS.get(name, {})))
    if skips:
        model = without_last_attention(model, 1)
    weights, step = jax.jit(prepare)(model), jax.jit(decode)
    tokens = random_prompt(CHUNK + T, 3)
    cache, caches, logits = model.init_cache(1), [], []
    for token in tokens:
        caches.append(cache)
        scores, cache = step(weights, cache, token[None])
        logits.append(np.asarray(scores)[0])
    caches.append(cache)
    prefix = without_slots(caches[CHUNK])
    features = Features(logprobs=0)
    params = SamplingParams(temperature=0.0, logprobs=0)
    for count in (1, 4, T):
        padded = np.zeros(T, np.int32)
        padded[:count] = tokens[CHUNK : CHUNK + count]
        slots, emitted = start_known_row(
            poisoned_slots(model),
            weights,
            prefix,
            pack_start(
                SLOT, Continuation(padded, np.int32(count)), params, features, vocab_size=VOCAB
            ),
            features,
        )
        expected, scores = caches[CHUNK + count], logits[CHUNK + count - 1]
        found = slots.cache
        assert emitted.tokens[0, 0] == np.argmax(scores)
        np.testing.assert_allclose(
            emitted.logprobs.token[0, 0], jax.nn.log_softmax(scores).max(), rtol=1e-5
        )
        assert_near(of_row(without_slots(found), SLOT), of_row(without_slots(expected), 0))
        num_complete = model.config.num_layers - model.config.skip_attention
        layers = zip(found.layers[:num_complete], expected.layers, strict=False)
        for layer, old_layer in layers:
            for new, old in zip(
                of_row(layer.keys_and_values, SLOT),
                of_row(old_layer.keys_and_values, 0),
                strict=True,
            ):
                assert relative_error(new[:, :count], old[:, :count]) <= 2e-6
                np.testing.assert_array_equal(new[:, T:], 0)
                assert np.isfinite(new).all()
        poison = poisoned_slots(model).cache
        for other in (0, 2):
            jax.tree.map(np.testing.assert_array_equal, of_row(found, other), of_row(poison, other))
