"""The modules inside a Linen model, through Flax's bridge."""

import jax
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import numpy as jnp

from megalodon_jax.model import Megalodon
from megalodon_jax.modules import CEMA, Block
from tests.interop_flax.conftest import TINY, next_token_loss


class Classifier(linen.Module):
    """CEMA and a block between two Linen layers."""

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(TINY.model_dim)(x)
        x = nnx.bridge.to_linen(CEMA, TINY.model_dim, order=2, name="cema")(x).y
        x = nnx.bridge.to_linen(Block.from_config, TINY, name="block")(x).x
        return linen.Dense(1)(x[:, -1])[:, 0]


@pytest.mark.slow
def test_a_linen_model_trains_our_modules():
    x = jax.random.normal(jax.random.key(0), (4, 13, 3))
    labels = jnp.sign(x[:, :, 0].sum(axis=1))
    model, optimizer = Classifier(), optax.adam(1e-2)
    params = linen.meta.unbox(jax.jit(model.init)(jax.random.key(1), x))["params"]
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            return jnp.mean(jnp.square(model.apply({"params": params}, x) - labels))

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, value, gradient

    losses, start = [], params
    for _ in range(8):
        params, opt_state, value, gradient = step(params, opt_state)
        losses.append(float(value))
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient["cema"]))
    assert losses[-1] < 0.5 * losses[0]
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), start, params)
    assert changed["block"]["mega"]["wv"]["kernel"]
    assert changed["cema"]["omega"]


@pytest.mark.slow
def test_gradients_equal_those_of_nnx(tokens):
    bridge = nnx.bridge.ToLinen(Megalodon, args=(TINY,))
    variables = linen.meta.unbox(jax.jit(bridge.init)(jax.random.key(1), tokens))
    model = Megalodon(TINY, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, variables["params"])
    nnx.update(model, state)

    def loss(params):
        return next_token_loss(lambda tokens: bridge.apply({"params": params}, tokens), tokens)

    value, gradient = jax.jit(jax.value_and_grad(loss))(variables["params"])
    expected_value, expected = nnx.jit(nnx.value_and_grad(next_token_loss))(model, tokens)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    expected = nnx.to_pure_dict(nnx.state(expected))
    assert jax.tree.structure(gradient) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_block_gives_what_it_gives_in_nnx():
    x = jax.random.normal(jax.random.key(0), (2, 13, TINY.model_dim))
    bridge = nnx.bridge.to_linen(Block.from_config, TINY)
    variables = linen.meta.unbox(jax.jit(bridge.init)(jax.random.key(1), x))
    block = Block.from_config(TINY, rngs=nnx.Rngs(0))
    state = nnx.state(block)
    nnx.replace_by_pure_dict(state, variables["params"])
    nnx.update(block, state)

    def total(params):
        return jnp.sum(jnp.sin(bridge.apply({"params": params}, x).x))

    value, gradient = jax.jit(jax.value_and_grad(total))(variables["params"])
    run = nnx.jit(nnx.value_and_grad(lambda block: jnp.sum(jnp.sin(block(x).x))))
    expected_value, expected = run(block)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    expected = nnx.to_pure_dict(nnx.state(expected))
    assert jax.tree.structure(gradient) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
