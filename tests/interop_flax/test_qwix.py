"""Qwix on whole models: LoRA, and int8 and int4 weights, with blocks scanned and written out."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.language_model import ModelOutput
from megalodon_jax.modules import Linear
from megalodon_jax.parallel.sharding import shardings_of
from tests.interop_flax.conftest import TRANSFORMER, make_model, next_token_loss

qwix = pytest.importorskip("qwix")
# Qwix 0.1.8 reads Variables by names that Flax has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MAX_CODE = {"int8": 127, "int4": 7}
LAYERS = "wv", "wz", "wr", "wh1", "wh2", "fc1", "fc2", "fc3"


def with_lora(model, tokens, **options):
    provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0, **options)
    return qwix.apply_lora_to_model(model, provider, tokens, rngs=nnx.Rngs(1))


def quantized(model, tokens, weight_qtype: str, **options):
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=weight_qtype, **options)
    return qwix.quantize_model(model, qwix.PtqProvider([rule]), tokens)


@pytest.fixture(scope="module")
def bases():
    """Models by `scan_layers`."""
    return {scan: make_model(scan_layers=scan) for scan in (True, False)}


@pytest.fixture(scope="module")
def expected(bases, tokens):
    return np.asarray(nnx.jit(lambda model: model(tokens).logits)(bases[True]))


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_lora_starts_at_the_base_and_learns_alone(bases, expected, tokens, scan):
    base = bases[scan]
    model = with_lora(base, tokens)
    factors = dict(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
    kernels = [path for path, _ in nnx.to_flat_state(nnx.state(base)) if path[-1] == "kernel"]
    assert {path[-2] for path in kernels} == {*LAYERS, "output"}
    assert set(factors) == {
        (*path[:-1], f"kernel_lora_{factor}") for path in kernels for factor in "ab"
    }
    first = factors["layers", "mega", "wv", "kernel_lora_a"]
    assert first.shape == (2, 16, 4)
    assert first.get_metadata()["out_sharding"] == ("layers", "embed", None)
    assert not np.allclose(first[0], first[1]), "all layers start from the same factors"

    frozen = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(tokens).logits
            return next_token_loss(lambda _: ModelOutput(logits, None), tokens), logits

        argument = nnx.DiffState(0, nnx.LoRAParam)
        (value, logits), gradient = nnx.value_and_grad(loss, argnums=argument, has_aux=True)(model)
        optimizer.update(model, gradient)
        return value, logits, nnx.state(gradient)

    losses = []
    for number in range(4):
        value, logits, gradient = step(model, optimizer)
        losses.append(float(value))
        if number == 0:
            np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
            assert {path for path, _ in nnx.to_flat_state(gradient)} == set(factors)
    assert losses == sorted(losses, reverse=True)
    after = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    assert all(np.array_equal(a, b) for a, b in zip(frozen, after, strict=True))


@pytest.mark.parametrize(
    ("scan", "qtype"),
    [
        (False, "int4"),
        pytest.param(True, "int8", marks=pytest.mark.slow),
        pytest.param(True, "int4", marks=pytest.mark.slow),
        pytest.param(False, "int8", marks=pytest.mark.slow),
    ],
)
def test_quantized_weights(bases, expected, tokens, scan, qtype):
    """They are codes on a grid, and the model is the one whose weights lie on that grid."""
    base = bases[scan]
    model = quantized(base, tokens, qtype)
    state = dict(nnx.to_flat_state(nnx.state(model)))
    values = {path: leaf for path, leaf in state.items() if path[-1] == "qvalue"}
    assert {path[-4] for path in values} == {*LAYERS, "output"}
    assert {leaf.dtype for leaf in values.values()} == {jnp.dtype(qtype)}
    assert not any(path[-1] == "kernel" for path in state), "full-precision kernels are left"

    # The grid of a column has one step; rounding to it moves a weight by half a step at most.
    rounded = nnx.clone(base)
    weights = nnx.state(rounded)
    for path, leaf in nnx.to_flat_state(weights):
        if path[-1] != "kernel":
            continue
        weight = np.asarray(leaf[...], np.float64)
        codes, step = (
            np.asarray(state[*path, "array", name][...], np.float64) for name in ("qvalue", "scale")
        )
        assert step.shape == (*weight.shape[:-2], 1, weight.shape[-1])
        assert np.all(step <= np.abs(weight).max(axis=-2, keepdims=True) / MAX_CODE[qtype])
        assert np.all(np.abs(codes * step - weight) <= 0.5 * step + 1e-6)
        leaf[...] = jnp.asarray(codes * step, jnp.float32)
    nnx.update(rounded, weights)
    run = nnx.jit(lambda model: model(tokens).logits)
    got, same_weights = np.asarray(run(model)), np.asarray(run(rounded))
    np.testing.assert_allclose(got, same_weights, rtol=1e-3, atol=1e-3)
    # Measured: 0.005 and 0.09.
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < {"int8": 0.015, "int4": 0.25}[qtype]


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_quantized_activations(bases, expected, tokens, scan):
    model = quantized(bases[scan], tokens, "int8", act_qtype="int8")
    got = nnx.jit(lambda model: model(tokens).logits)(model)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.04


@pytest.mark.slow
def test_transformer(tokens):
    base = make_model(TRANSFORMER)
    run = nnx.jit(lambda model: model(tokens).logits)
    expected = run(base)
    model = with_lora(base, tokens)
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-5)
    assert len(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))) == 2 * 8
    got = run(quantized(base, tokens, "int8"))
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.02


@pytest.mark.slow
def test_methods_that_qwix_does_not_wrap_are_refused(bases, tokens):
    model = with_lora(bases[True], tokens)
    with pytest.raises(RuntimeError, match="outside the wrapped method"):
        jax.eval_shape(lambda: model.hidden(tokens).hidden)
    with pytest.raises(TypeError, match="in place of output_matrix"):
        model.output_matrix()


@pytest.mark.slow
def test_dropout_of_lora_differs_in_every_call(tokens):
    model = with_lora(make_model(), tokens, dropout=0.5)
    for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        leaf[...] = jnp.ones_like(leaf[...])
    model.set_attributes(qwix_rngs=nnx.Rngs(dropout=3))
    run = nnx.jit(lambda model: model(tokens).logits)
    first, second = run(model), run(model)
    assert not np.allclose(first, second)


@pytest.mark.parametrize("qtype", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_kernels_may_hold_quantized_arrays(bases, tokens, qtype):
    """Without Qwix's interception, so that every method of the model takes them."""
    held, rounded = nnx.clone(bases[True]), nnx.clone(bases[True])
    targets = dict(nnx.iter_modules(rounded))
    for path, module in nnx.iter_modules(held):
        if not isinstance(module, Linear | nnx.Linear):
            continue
        weight = module.kernel[...]
        channels = [axis for axis in range(weight.ndim) if axis != weight.ndim - 2]
        codes = qwix.quantize(weight, qtype, channelwise_axes=channels)
        module.kernel = module.kernel.replace(codes)
        targets[path].kernel[...] = qwix.dequantize(codes)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(held))}
    assert jnp.dtype(qtype) in dtypes
    run = nnx.jit(lambda model: (model(tokens).logits, model.hidden(tokens).hidden))
    for got, want in zip(run(held), run(rounded), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_lora_and_int8_on_several_devices(bases, tokens):
    """Tensor parallelism and FSDP: rows, channels and weights are sharded."""
    rows = tokens[:, :12]
    mesh = jax.make_mesh(
        (1, 2, 1, 2), ("replica", "data", "chunk", "model"), (jax.sharding.AxisType.Auto,) * 4
    )
    base = make_model(vocab_size=32)
    for model in (with_lora(base, tokens), quantized(base, tokens, "int8")):
        for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
            leaf[...] = leaf[...] + 0.1
        graphdef, state = nnx.split(model)

        def apply(state, graphdef=graphdef):
            return nnx.merge(graphdef, state)(rows).logits

        expected = jax.jit(apply)(state)
        sharded = jax.device_put(state, shardings_of(state, mesh))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            got = jax.jit(lambda state: apply(state))(sharded)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
