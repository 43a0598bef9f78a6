"""Models of every ablation: streams, packed documents, generation, rematerialization."""

import dataclasses
import itertools
from functools import partial

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import ModelConfig, Remat
from megalodon_jax.generate import generate
from megalodon_jax.model import Megalodon
from tests.ablations import VARIANTS
from tests.golden_files import relative_error
from tests.model.conftest import perturbed

CONFIG = ModelConfig(
    num_layers=2, model_dim=16, z_dim=8, value_dim=16, num_heads=2, ffn_hidden_dim=24,
    cema_ndim=3, chunk_size=8, vocab_size=61, norm_num_groups=4,
    # Compiles fastest; the tests of every operation compare its implementations.
    implementation="reference",
)  # fmt: skip
# Row 0: documents that cross chunks, one of a single token, padding. Row 1: one document.
LENGTHS = [[13, 1, 18], [35]]
L = 35
PIECE = 5


@pytest.fixture(scope="session")
def ablated():
    """Returns the model of a variant, made once."""
    models: dict[str, Megalodon] = {}

    def get(name: str) -> Megalodon:
        if name not in models:
            models[name] = perturbed(dataclasses.replace(CONFIG, **VARIANTS.get(name, {})))
        return models[name]

    return get


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 61, (2, L)).astype(np.int32)


@pytest.fixture(scope="module")
def segment_ids() -> np.ndarray:
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in LENGTHS]
    return np.stack([np.pad(row, (0, L - len(row))) for row in ids]).astype(np.int32)


def documents_of(tokens: np.ndarray) -> list[tuple[int, slice]]:
    """Row and columns of every document."""
    ends = [np.cumsum([0, *row]) for row in LENGTHS]
    return [
        (row, slice(start, stop))
        for row, borders in enumerate(ends)
        for start, stop in itertools.pairwise(borders)
    ]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "all, ema" else pytest.mark.slow) for name in VARIANTS],
)
def test_packed_documents_and_streams_equal_documents_alone(
    jitted, ablated, tokens, segment_ids, name: str
):
    model = ablated(name)
    call = jitted(model)
    packed, _ = call(tokens, None, segment_ids)
    cache, outputs = model.init_cache(2), []
    for start in range(0, L, PIECE):
        columns = slice(start, start + PIECE)
        logits, cache = call(tokens[:, columns], cache, segment_ids[:, columns])
        outputs.append(logits)
    streamed = np.concatenate(outputs, 1)
    for row, columns in documents_of(tokens):
        alone, ids = np.zeros_like(tokens), np.zeros_like(tokens)
        length = columns.stop - columns.start
        alone[0, :length], ids[0, :length] = tokens[row, columns], 1
        expected = call(alone, None, ids).logits[0, :length]
        assert relative_error(packed[row, columns], expected) <= 2e-6
        assert relative_error(streamed[row, columns], expected) <= 2e-6
    np.testing.assert_array_equal(cache.position, [18, 35])


@pytest.mark.slow
def test_every_switch_changes_the_output(jitted, ablated, tokens, segment_ids):
    """Pre-norm, no qk norm and no positions have the default's parameters, here its weights too."""
    outputs = {}
    for name in ("default", *VARIANTS):
        logits = np.asarray(jitted(ablated(name))(tokens, None, segment_ids).logits)
        outputs[name] = logits[segment_ids > 0]
        assert np.isfinite(logits).all(), name
    names = list(outputs)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert relative_error(outputs[name], outputs[other]) > 1e-2, (name, other)
    for name in ("pre-norm", "no qk norm", "no positions"):
        same, default = (nnx.to_pure_dict(nnx.state(ablated(n))) for n in (name, "default"))
        chex.assert_trees_all_equal(same, default)


def test_the_cache_has_only_the_states_of_the_model():
    def states(name: str) -> tuple[bool, bool, bool]:
        config = dataclasses.replace(CONFIG, **VARIANTS.get(name, {}))
        cache = jax.eval_shape(lambda: Megalodon(config, rngs=nnx.Rngs(0)).init_cache(2))
        (layer, *_) = cache.layers
        return layer.cema is not None, layer.norm is not None, cache.final_norm is not None

    assert states("default") == states("ema") == states("pre-norm") == (True, True, True)
    assert states("no average") == (False, True, True)
    assert states("layer norm") == states("rms norm") == (True, False, False)
    assert states("all, no average") == (False, False, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all, ema", "all, no average"])
def test_generation_equals_greedy_decoding_from_whole_sequences(jitted, ablated, name: str):
    model = ablated(name)
    prompts = np.random.default_rng(1).integers(0, 61, (2, 9)).astype(np.int32)
    lengths = np.array([9, 4])
    generated = generate(model, prompts, lengths, max_tokens=5, temperature=0.0)
    call = jitted(model)
    for row, length in enumerate(lengths):
        tokens, ids = np.zeros((2, L), np.int32), np.zeros((2, L), np.int32)
        tokens[0, :length] = prompts[row, :length]
        for i, token in enumerate(generated[row]):
            ids[0, : length + i] = 1
            assert token == np.argmax(call(tokens, None, ids).logits[0, length + i - 1])
            tokens[0, length + i] = token


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all, ema", "all, no average"])
def test_rematerialization_does_not_change_gradients(ablated, tokens, segment_ids, name: str):
    model = ablated(name)
    params = nnx.state(model, nnx.Param)

    def gradients(remat: Remat, scan_layers: bool) -> nnx.State:
        config = dataclasses.replace(model.config, remat=remat, scan_layers=scan_layers)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: Megalodon(config, rngs=nnx.Rngs(0))))

        def loss(params):
            hidden, _ = nnx.merge(graphdef, params).hidden(tokens, segment_ids=segment_ids)
            return jnp.sum(jnp.where(segment_ids[..., None] > 0, jnp.sin(hidden), 0))

        return jax.jit(jax.grad(loss))(params)

    expected = gradients("none", True)
    cases: list[tuple[Remat, bool]] = [
        ("off", True), ("inputs", True), ("dots", True), ("block", True),
        ("off", False), ("inputs", False),
    ]  # fmt: skip
    for remat, scan_layers in cases:
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            gradients(remat, scan_layers),
            expected,
        )
