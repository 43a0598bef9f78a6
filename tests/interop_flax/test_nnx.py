"""Uses of a module in Flax NNX and JAX: tables, optimizers, transformations, export."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.modules import Block
from tests.interop_flax.conftest import TINY, TRANSFORMER, make_model, next_token_loss

# Derivatives and export depend on the implementation: the default, not that of the small models.
FASTEST: dict[str, Any] = {"implementation": None}


@pytest.mark.slow
def test_tabulate_counts_every_parameter(model, tokens):
    table = nnx.tabulate(model, tokens, console_kwargs={"width": 240, "force_terminal": False})
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert f"Total Parameters: {count:,}" in table
    for path in ("embed", "final_norm", "layers", "output"):
        assert path in table


# Treescope looks at every name of NumPy's modules, deprecated ones among them.
@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")
def test_treescope_renders_every_parameter(model):
    treescope = pytest.importorskip("treescope")
    assert treescope.render_to_html(model)
    text = treescope.render_to_text(model)
    for name in ("wh2", "omega", "final_norm"):
        assert name in text


@pytest.mark.slow
def test_optimizer_takes_the_step_of_the_pure_form(model, tokens):
    changed = nnx.clone(model)
    optimizer = nnx.Optimizer(changed, optax.sgd(0.5), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        loss, gradient = nnx.value_and_grad(next_token_loss)(model, tokens)
        optimizer.update(model, gradient)
        return loss

    first, second = step(changed, optimizer, tokens), step(changed, optimizer, tokens)
    assert second < first

    graphdef, params = nnx.split(model)

    @jax.jit
    def pure_step(params):
        gradient = jax.grad(lambda p: next_token_loss(nnx.merge(graphdef, p), tokens))(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)

    expected = jax.tree.leaves(pure_step(pure_step(params)))
    for got, want in zip(jax.tree.leaves(nnx.state(changed)), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_copies_have_the_same_logits(model, tokens, forward):
    expected = forward(model, tokens)
    other = make_model(seed=1)
    assert not np.array_equal(forward(other, tokens), expected)
    nnx.update(other, nnx.state(model))
    for copy in (nnx.clone(model), nnx.merge(*nnx.split(model)), other):
        np.testing.assert_array_equal(forward(copy, tokens), expected)


def test_layer_slices_name_their_own_axes(model):
    """A module inside the loop has the axis names of one layer, which libraries read."""
    seen = []

    class Recorder(type(model.layers.mega.wv)):
        def product(self, x, *, name=None):
            seen.append((self.kernel.ndim, self.kernel.get_metadata()["out_sharding"]))
            return super().product(x, name=name)

    recorded = nnx.clone(model)
    recorded.layers.mega.wv.__class__ = Recorder
    jax.eval_shape(lambda: recorded(jnp.zeros((1, 3), jnp.int32)))
    assert seen
    assert set(seen) == {(2, ("embed", "value"))}
    names = recorded.layers.mega.wv.kernel.get_metadata()["out_sharding"]
    assert names == ("layers", "embed", "value")


@pytest.mark.slow
def test_vmap_over_models_and_over_rows(tokens, forward):
    create = nnx.vmap(lambda key: make_model(seed=key))
    models = create(jax.random.split(jax.random.key(5), 3))
    apply = nnx.jit(nnx.vmap(lambda model, tokens: model(tokens).logits, in_axes=(0, None)))
    logits = apply(models, tokens)
    graphdef, params = nnx.split(models)
    for i in range(3):
        one = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], params))  # noqa: B023
        np.testing.assert_allclose(logits[i], forward(one, tokens), rtol=1e-5, atol=1e-5)
        last = one
    rows = jax.jit(jax.vmap(lambda row: last(row[None]).logits[0]))(tokens)
    np.testing.assert_allclose(rows, forward(last, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["megalodon", "transformer"])
def test_export_with_symbolic_rows(kind, tokens, forward):
    pytest.importorskip("flatbuffers", reason="jax.export needs it to serialize")
    model = make_model(**FASTEST) if kind == "megalodon" else make_model(TRANSFORMER)
    graphdef, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)

    @jax.jit
    def apply(leaves, tokens):
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))(tokens).logits

    (rows,) = jax.export.symbolic_shape("rows")
    abstract = jax.ShapeDtypeStruct((rows, tokens.shape[1]), jnp.int32)
    exported = jax.export.export(apply)(leaves, abstract)
    call = jax.export.deserialize(exported.serialize()).call
    expected = forward(model, tokens)
    got = call(leaves, jnp.concatenate([tokens, tokens[:1]]))
    np.testing.assert_allclose(got[:2], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[2], expected[0], rtol=1e-5, atol=1e-5)


def test_export_refuses_a_symbolic_length():
    model = make_model(**FASTEST)
    (length,) = jax.export.symbolic_shape("length")
    abstract = jax.ShapeDtypeStruct((2, length), jnp.int32)
    with pytest.raises(ValueError, match="length length is symbolic"):
        jax.export.export(jax.jit(lambda tokens: model(tokens).logits))(abstract)


def _flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _distance(a, b) -> float:
    a, b = _flat(a), _flat(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _direction(params, seed: int):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([jax.random.normal(k, p.shape) for k, p in zip(keys, leaves)])


@pytest.mark.slow
def test_forward_over_reverse_through_a_block():
    """jvp of grad, against differences of the gradient."""
    block = Block.from_config(dataclasses.replace(TINY, **FASTEST), rngs=nnx.Rngs(0))
    x, v = (jax.random.normal(jax.random.key(i), (1, 13, TINY.model_dim)) for i in range(2))
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(block(x).x)))
    product = jax.jit(lambda: jax.jvp(gradient, (x,), (v,))[1])()
    compiled, step = jax.jit(gradient), 1e-2
    differences = (compiled(x + step * v) - compiled(x - step * v)) / (2 * step)
    assert _distance(product, differences) < 1e-2


@pytest.mark.slow
def test_second_derivatives_of_the_model(tokens):
    graphdef, params = nnx.split(make_model(**FASTEST))
    vector = _direction(params, 3)

    def products(graphdef):
        def loss(params):
            return next_token_loss(nnx.merge(graphdef, params), tokens)

        def along(params):
            gradient = jax.grad(loss)(params)
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, vector)))

        gradient = jax.grad(loss)
        forward_over_reverse = jax.jit(lambda p: jax.jvp(gradient, (p,), (vector,))[1])
        return forward_over_reverse, jax.jit(jax.grad(along)), jax.jit(gradient)

    forward_over_reverse, reverse_over_reverse, gradient = products(graphdef)
    product = forward_over_reverse(params)
    assert _distance(product, reverse_over_reverse(params)) < 1e-4
    # Operations without derivative rules of their own.
    plain = nnx.graphdef(make_model(implementation="reference"))
    assert _distance(product, products(plain)[0](params)) < 1e-4
    step = 1e-3
    above, below = (
        gradient(jax.tree.map(lambda p, v: p + sign * step * v, params, vector))  # noqa: B023
        for sign in (1, -1)
    )
    differences = jax.tree.map(lambda a, b: (a - b) / (2 * step), above, below)
    assert _distance(product, differences) < 1e-2


@pytest.mark.slow
def test_forward_mode_by_two_transpositions(tokens):
    """Derivative rules are for reverse mode; two of them give a derivative along a direction."""
    graphdef, params = nnx.split(make_model(**FASTEST))
    vector = _direction(params, 4)

    def loss(params):
        return next_token_loss(nnx.merge(graphdef, params), tokens)

    @jax.jit
    def both(params, vector):
        value, transposed = jax.vjp(loss, params)
        (derivative,) = jax.vjp(transposed, jnp.zeros_like(value))[1]((vector,))
        gradient = jax.grad(loss)(params)
        return derivative, sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, vector)))

    derivative, expected = both(params, vector)
    np.testing.assert_allclose(derivative, expected, rtol=1e-4)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (params,), (vector,))
