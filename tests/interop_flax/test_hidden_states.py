"""Embeddings in place of tokens, and the features of every layer."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from tests.interop_flax.conftest import TINY, TRANSFORMER, make_model

CONFIGS = [
    pytest.param(TINY, id="megalodon", marks=pytest.mark.slow),
    pytest.param(TRANSFORMER, id="transformer"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_embeddings_in_place_of_tokens(config, tokens):
    model = make_model(config)

    @nnx.jit
    def run(model, tokens):
        embeddings = model.embed(tokens)

        def total(**inputs):
            return jnp.sum(jnp.sin(model(**inputs).logits))

        by_embedding = jax.grad(lambda x: total(inputs_embeds=x))(embeddings)
        return model(tokens).logits, model(inputs_embeds=embeddings).logits, by_embedding

    @nnx.jit
    def by_table(model, tokens):
        gradient = nnx.grad(lambda model: jnp.sum(jnp.sin(model(tokens).logits)))(model)
        return gradient.embed.embedding[...]

    logits, same, gradient = run(model, tokens)
    np.testing.assert_array_equal(logits, same)
    table = np.zeros((config.vocab_size, config.model_dim), np.float64)
    np.add.at(table, np.asarray(tokens), np.asarray(gradient, np.float64))
    np.testing.assert_allclose(by_table(model, tokens), table, rtol=1e-4, atol=1e-4)


def test_embeddings_of_megalodon_in_place_of_tokens(model, tokens, forward):
    run = nnx.jit(lambda model, tokens: model(inputs_embeds=model.embed(tokens)).logits)
    np.testing.assert_allclose(run(model, tokens), forward(model, tokens), rtol=1e-6, atol=1e-6)


def test_wrong_inputs_are_refused(model, tokens):
    embeddings = jnp.zeros((2, 5, TINY.model_dim))
    with pytest.raises(ValueError, match="one of the two; neither came in"):
        model()
    with pytest.raises(ValueError, match="one of the two; both came in"):
        model(tokens, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match=r"inputs_embeds have shape \(2, 5, 15\); need"):
        model(inputs_embeds=embeddings[..., :-1])


@pytest.mark.parametrize("config", CONFIGS)
def test_hidden_states_are_the_features_between_blocks(config, tokens):
    """The loop returns what blocks that are called one by one return, with its gradients."""
    weights = jax.random.normal(
        jax.random.key(2), (config.num_layers + 1, *tokens.shape, config.model_dim)
    )

    def states_and_gradient(model):
        def total(model):
            output = model.hidden_states(tokens)
            return jnp.sum(weights * output.hidden_states), output

        gradient, output = nnx.grad(total, has_aux=True)(model)
        return output, nnx.state(gradient)

    scanned, gradient = nnx.jit(states_and_gradient)(make_model(config))
    assert scanned.cache is None
    assert scanned.hidden_states.shape == weights.shape

    written_out = make_model(config, scan_layers=False)
    unrolled, expected = nnx.jit(states_and_gradient)(written_out)
    for got, want in zip(
        jax.tree.leaves((scanned, gradient)), jax.tree.leaves((unrolled, expected)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_hidden_states_of_blocks_called_alone(model, tokens):
    output = nnx.jit(lambda model: model.hidden_states(tokens))(model)
    states = output.hidden_states
    embeddings = model.embed(tokens) * np.sqrt(TINY.model_dim)
    np.testing.assert_allclose(states[0], embeddings, rtol=1e-6)
    graphdef, params = nnx.split(model.layers)
    call = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x).x)
    for number in range(TINY.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[number], params)  # noqa: B023
        got = call(layer, states[number])
        np.testing.assert_allclose(got, states[number + 1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.final_norm(states[-1]).y, output.hidden, rtol=1e-5, atol=1e-5)


def test_hidden_states_cost_nothing_if_not_asked_for(model, tokens):
    def sizes(function) -> set[int]:
        jaxpr = jax.make_jaxpr(function)(tokens)
        (scan,) = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 2]
        return {out.aval.size for out in scan.outvars}

    assert sizes(lambda tokens: model.hidden(tokens).hidden) == {tokens.size * 16}
    stacked = sizes(lambda tokens: model.hidden_states(tokens).hidden_states)
    assert stacked == {tokens.size * 16, 2 * tokens.size * 16}


@pytest.mark.slow
def test_hidden_states_while_streaming(model, tokens):
    run = nnx.jit(lambda model, tokens, cache: model.hidden_states(tokens, cache=cache))
    whole = run(model, tokens, None).hidden_states
    cache, pieces = model.init_cache(2), []
    for piece in (tokens[:, :12], tokens[:, 12:]):
        output = run(model, piece, cache)
        cache = output.cache
        pieces.append(output.hidden_states)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=2), whole, rtol=1e-4, atol=1e-4)
