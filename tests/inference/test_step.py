"""The decoding step: equal to a full forward pass, in place, for every variant of the model."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.inference.blocks import decode_block, empty_slots
from megalodon_jax.inference.decoders import prepare_decoding
from megalodon_jax.inference.sampling import Features, empty_state
from megalodon_jax.inference.step import decode
from megalodon_jax.inference.weights import prepare
from pallas_kernels.skinny_matmul.types import values_of
from tests.ablations import VARIANTS
from tests.golden_files import relative_error
from tests.inference.models import CHUNK, CONFIG, VOCAB, random_prompt, small_model
from tests.model.conftest import perturbed

B, S, LENGTH = 3, 5, 2 * CHUNK + 5
OTHERS = {
    "default": {},
    "tied, prior, no affine": {
        "share_emb": True, "norm_prior_count": 3, "norm_affine": False, "scale_emb": True,
        "swiglu": False, "rescale_nffn": False,
    },
}  # fmt: skip


# A variant that changes all switches at once covers the single ones, which tell what is wrong.
QUICK = ("default", "all, ema")


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in (*OTHERS, *VARIANTS)
    ],
)
@pytest.mark.slow
def test_steps_equal_the_full_forward_pass(variant: str):
    model = perturbed(dataclasses.replace(CONFIG, **(OTHERS | VARIANTS)[variant]))
    tokens = np.stack([random_prompt(LENGTH, seed) for seed in range(B)])
    expected = nnx.jit(lambda model, tokens: model(tokens).logits)(model, tokens)
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        weights = prepare(model)

        def step(cache, tokens):
            logits, cache = decode(weights, cache, tokens)
            return cache, logits

        cache, logits = jax.lax.scan(step, model.init_cache(S), jnp.asarray(tokens.T))
        return logits.swapaxes(0, 1), cache

    logits, cache = run(params)
    assert relative_error(logits, expected) <= 2e-6
    np.testing.assert_array_equal(cache.position, [LENGTH] * B + [0] * (S - B))
    np.testing.assert_array_equal(cache.segment, [1] * B + [0] * (S - B))


def poisoned(cache, row: int):
    """The cache with NaN in a row's states, keys and values."""

    def poison(leaf):
        return leaf.at[row].set(jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(poison, cache)


@pytest.mark.slow
def test_rows_that_are_not_active_stay():
    model = small_model()
    weights, step = jax.jit(prepare)(model), jax.jit(decode)
    cache = poisoned(model.init_cache(S), 1)
    active = np.array([True, False, True])
    tokens = random_prompt(B)
    for _ in range(CHUNK + 2):
        before = cache
        logits, cache = step(weights, cache, tokens, active)
        for row in (1, *range(B, S)):
            for new, old in zip(cache.layers, before.layers, strict=True):
                new, old = new._replace(keys_and_values=None), old._replace(keys_and_values=None)
                for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
                    np.testing.assert_array_equal(a[row], b[row])
    np.testing.assert_array_equal(cache.position, [CHUNK + 2, 0, CHUNK + 2, 0, 0])
    assert np.isfinite(np.asarray(logits)[active]).all()


def test_a_row_goes_on_after_steps_without_it():
    """Steps write for an inactive row into slots that it has not filled."""
    model = small_model()
    weights, step = jax.jit(prepare)(model), jax.jit(decode)
    expected, paused = model.init_cache(2), model.init_cache(2)
    both = np.ones(2, bool)
    for token in random_prompt(9):
        logits, expected = step(weights, expected, np.array([token, 1]), both)
        _, paused = step(weights, paused, np.array([7, 2]), np.array([False, True]))
        paused_logits, paused = step(weights, paused, np.array([token, 3]), both)
        np.testing.assert_array_equal(logits[0], paused_logits[0])


@pytest.mark.slow
def test_int8_weights_are_near():
    model = small_model()
    tokens = random_prompt(B)
    full, small = (
        jax.jit(decode)(weights, model.init_cache(B), tokens).logits
        for weights in (prepare(model), prepare(model, "int8"))
    )
    assert 1e-4 < relative_error(small, full) < 3e-2
    with pytest.raises(ValueError, match="use 'model' or 'int8'"):
        prepare(model, "int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["model", "int8"])
def test_projections_after_layer_norm_have_their_sums_of_weights(weights):
    for layer in prepare(small_model(), weights).layers:
        assert all(each.weight_sums is None for each in (layer.values, *layer.mixed))
        for projection in layer.ffn_input:
            matrix = values_of(projection.kernel)
            expected = np.asarray(matrix, np.float64).sum(axis=1)
            np.testing.assert_allclose(projection.weight_sums, expected, atol=1e-5)


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_a_block_of_steps_updates_the_cache_in_place(kv):
    """No operation of the compiled steps makes another array of a cache's shape."""
    config = dataclasses.replace(CONFIG, chunk_size=256, model_dim=64, value_dim=128, z_dim=32)
    rows = 4

    def make():
        model = perturbed(config)
        state = empty_slots(model.init_cache(rows, kv=kv), empty_state(rows, vocab_size=VOCAB))
        return prepare_decoding(model), state

    weights, slots = jax.eval_shape(make)
    compiled: Any = decode_block.lower(weights, slots, rows, 8, Features(), None).compile(
        {"xla_backend_optimization_level": 3}
    )
    leaves = [leaf for layer in slots.cache.layers for leaf in jax.tree.leaves(layer)]
    shapes = {f"[{','.join(map(str, leaf.shape))}]" for leaf in leaves if leaf.ndim > 2}
    copies = [
        line
        for line in compiled.as_text().splitlines()
        if re.search(r" (copy|broadcast|concatenate|transpose)\(", line)
        and any(shape in line.split(" = ")[1].split("{")[0] for shape in shapes)
    ]
    assert not copies
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
