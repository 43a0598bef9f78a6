"""The last attention sub-layers left out: as if their output matrices were zero."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.config import TrainConfig, TransformerConfig
from megalodon_jax.errors import ConfigError, StateDictError
from megalodon_jax.evaluation.variants import without_last_attention
from megalodon_jax.generate import generate
from megalodon_jax.inference.decoders import decode, prepare_decoding
from megalodon_jax.inference.positions import commit, decode_positions
from megalodon_jax.interop.released import released_entries
from megalodon_jax.language_model import LanguageModel
from tests.model.conftest import SMALL, perturbed

OUTPUTS = {"megalodon": ("mega", ("wh1", "wh2")), "transformer": ("attention", ("wo",))}
VARIANTS = ["megalodon", "pre-norm", "transformer"]
TOKENS = np.random.default_rng(0).integers(61, size=(2, 37)).astype(np.int32)


@pytest.fixture(scope="module")
def models(shared_compilation) -> dict[str, LanguageModel]:
    transformer = TransformerConfig(
        num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, ffn_hidden_dim=40, vocab_size=61
    )
    return {
        "megalodon": perturbed(SMALL),
        "pre-norm": perturbed(dataclasses.replace(SMALL, residual_connection="pre_norm")),
        "transformer": Transformer(transformer, rngs=nnx.Rngs(0)),
    }


def with_zero_outputs(model: LanguageModel, count: int) -> LanguageModel:
    """A copy whose last attention sub-layers give zero."""
    graphdef, params = nnx.split(model, nnx.Param)
    name, linears = OUTPUTS[model.config.kind]
    copy = nnx.merge(graphdef, jax.tree.map(jnp.copy, params))
    for linear in linears:
        module = getattr(getattr(copy.layers, name), linear)
        for parameter in (module.kernel, getattr(module, "bias", None)):
            if parameter is not None:
                parameter[...] = parameter[...].at[model.config.num_layers - count :].set(0.0)
    return copy


def logits_of(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    graphdef, params = nnx.split(model)
    return np.asarray(jax.jit(lambda params: nnx.merge(graphdef, params)(tokens).logits)(params))


@pytest.mark.slow
@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("count", [1, 2])
def test_skipped_attention_is_attention_that_gives_zero(models, kind, count):
    model = models[kind]
    skipping = without_last_attention(model, count)
    expected = logits_of(with_zero_outputs(model, count), TOKENS)
    found = logits_of(skipping, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found - logits_of(model, TOKENS)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", VARIANTS)
def test_prefill_and_decoding_skip_the_same(models, kind):
    """A piece and single tokens through the cache give what one call gives."""
    model = without_last_attention(models[kind], 1)
    expected = logits_of(model, TOKENS)
    graphdef, params = nnx.split(model)

    @jax.jit
    def stream(params):
        model = nnx.merge(graphdef, params)
        cache = model.init_cache(2, max_length=64)
        first, cache = model(TOKENS[:, :33], cache=cache)
        weights, active = prepare_decoding(model), jnp.ones(2, bool)
        rest = []
        for column in range(33, 37):
            logits, cache = decode(weights, cache, TOKENS[:, column], active)
            rest.append(logits)
        return jnp.concatenate([first, jnp.stack(rest, axis=1)], axis=1)

    np.testing.assert_allclose(stream(params), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_several_tokens_at_once_skip_the_same(models):
    model = without_last_attention(models["megalodon"], 1)
    expected = logits_of(model, TOKENS)
    graphdef, params = nnx.split(model)

    @jax.jit
    def stream(params):
        model = nnx.merge(graphdef, params)
        _, cache = model(TOKENS[:, :33], cache=model.init_cache(2))
        weights = prepare_decoding(model)
        several, cache, pending = decode_positions(weights, cache, TOKENS[:, 33:36])
        cache = commit(weights, cache, pending, jnp.array([3, 3]))
        last, _ = decode(weights, cache, TOKENS[:, 36], jnp.ones(2, bool))
        return jnp.concatenate([several, last[:, None]], axis=1)

    np.testing.assert_allclose(stream(params), expected[:, 33:], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_engine_skips_the_same(models):
    model = without_last_attention(models["megalodon"], 1)
    row = TOKENS[:1, :20]
    new = generate(model, row, max_tokens=3, temperature=0.0)
    for token in new[0]:
        assert logits_of(model, row)[0, -1].argmax() == token
        row = np.append(row, [[token]], axis=1).astype(np.int32)


@pytest.mark.slow
def test_training_and_released_names_refuse_it(models):
    with pytest.raises(ConfigError, match="skip_attention is 3, but the model has 2 layers"):
        without_last_attention(models["megalodon"], 3)
    model = without_last_attention(models["megalodon"], 1)
    with pytest.raises(ConfigError, match="for inference: train with 0"):
        TrainConfig(model=model.config)
    with pytest.raises(ValueError, match="which is for inference"):
        model.hidden(TOKENS, cache=model.init_carried_state(2))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="which is for inference"):
        model.hidden(TOKENS, dropout_key=jax.random.key(0))
    with pytest.raises(StateDictError, match="skip_attention = 1"):
        released_entries(model.config)  # type: ignore[arg-type]
