"""LoRA factors of linear layers: where they are, what they compute, their gradients, the merge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.config import LoraConfig, TransformerConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.inference.decoders import prepare_decoding
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.lora import add_lora, has_lora, linear_kernels, merge_lora
from megalodon_jax.models import build_model
from megalodon_jax.modules import Linear
from megalodon_jax.modules.dropout import dropout, fold_key
from megalodon_jax.modules.linear import SharedInput
from tests.fixtures_runs import TINY_MODEL

LORA = LoraConfig(rank=3, alpha=6.0)
MODELS = {
    "scanned": dataclasses.replace(TINY_MODEL, num_layers=2, swiglu=True),
    "written out": dataclasses.replace(TINY_MODEL, num_layers=2, swiglu=True, scan_layers=False),
    "transformer": TransformerConfig(
        num_layers=2, model_dim=8, num_heads=2, ffn_hidden_dim=12, vocab_size=257
    ),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 13)), jnp.int32)
# Two documents and padding in a row.
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 8, [1] * 9 + [0] * 4], jnp.int32)


def adapted(name: str, config: LoraConfig = LORA) -> LanguageModel:
    model = build_model(MODELS[name], rngs=nnx.Rngs(0))
    add_lora(model, config, rngs=nnx.Rngs(1))
    return model


def randomize(model: nnx.Module) -> None:
    """B is no longer zero."""
    key = jax.random.key(2)
    for number, linear in enumerate(linear_kernels(model).values()):
        if linear.lora is not None:
            shape = linear.lora_b[...].shape
            linear.lora_b[...] = 0.1 * jax.random.normal(jax.random.fold_in(key, number), shape)


def loss(model: LanguageModel) -> tuple[jax.Array, jax.Array]:
    logits = model(TOKENS, segment_ids=SEGMENTS).logits
    return jnp.sum(jnp.sin(logits) * (SEGMENTS != 0)[..., None]), logits


FACTORS = nnx.DiffState(0, nnx.LoRAParam)
gradient_of_factors = nnx.jit(nnx.grad(loss, argnums=FACTORS, has_aux=True))
gradient_of_kernels = nnx.jit(nnx.grad(loss, has_aux=True))


MARKED = [
    "scanned",
    pytest.param("written out", marks=pytest.mark.slow),
    pytest.param("transformer", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", MARKED)
def test_outputs_and_gradients_are_those_of_the_dense_sum(name):
    """W + (alpha / r) A B as a dense kernel, differentiated by the chain rule in float64."""
    model, base = adapted(name), build_model(MODELS[name], rngs=nnx.Rngs(0))
    _, at_start = gradient_of_factors(model)
    _, of_base = gradient_of_kernels(base)
    np.testing.assert_allclose(at_start, of_base, rtol=1e-6, atol=1e-6)
    randomize(model)
    merged = merge_lora(model)
    assert has_lora(model)
    assert not has_lora(merged)
    assert merge_lora(merged) is merged
    assert jax.tree.structure(nnx.state(merged)) == jax.tree.structure(nnx.state(base))
    factors, got_logits = gradient_of_factors(model)
    dense, want_logits = gradient_of_kernels(merged)
    assert np.abs(want_logits - of_base).max() > 1e-2
    np.testing.assert_allclose(got_logits, want_logits, rtol=1e-5, atol=1e-5)
    compared = 0
    for path, linear in linear_kernels(model).items():
        *modules, _ = path.split(".")
        found, kernel = factors, dense
        for module in modules:
            found, kernel = found[module], kernel[module]
        dw = np.asarray(kernel["kernel"].get_value(), np.float64)
        a, b = (np.asarray(each[...], np.float64) for each in (linear.lora_a, linear.lora_b))
        for got, wanted in (
            (found["lora_a"].get_value(), 2.0 * dw @ b.swapaxes(-1, -2)),
            (found["lora_b"].get_value(), 2.0 * a.swapaxes(-1, -2) @ dw),
        ):
            scale = np.abs(wanted).max()
            assert scale > 0
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=2e-5 * scale)
            compared += 1
    assert compared == 2 * (7 if name == "transformer" else 8)


def test_factors_have_the_axes_of_their_kernels():
    model = adapted(
        "scanned", dataclasses.replace(LORA, targets=("layers.mega.w[vz].kernel", "*.fc2.*"))
    )
    found = {name for name, linear in linear_kernels(model).items() if linear.lora is not None}
    assert found == {f"layers.{name}.kernel" for name in ("mega.wv", "mega.wz", "nffn.fc2")}
    fc2 = model.layers.nffn.fc2
    assert fc2.lora == (2.0, 0.0)
    assert fc2.lora_a[...].shape == (2, 8, 3)
    assert fc2.lora_b[...].shape == (2, 3, 8)
    assert fc2.lora_a.get_metadata()["out_sharding"] == ("layers", "ffn", None)
    assert fc2.lora_b.get_metadata()["out_sharding"] == ("layers", None, "embed")
    # Kaiming's uniform distribution with a = sqrt(5), which PEFT has: the bound is 1 / sqrt(in).
    a = np.asarray(fc2.lora_a[...])
    assert 0.8 / np.sqrt(8) < np.abs(a).max() <= 1 / np.sqrt(8)
    assert not np.allclose(a[0], a[1]), "all layers start from the same factors"
    assert len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == 6
    with pytest.raises(
        ConfigError, match=r"'output.kernel', which matches no kernel.*layers.mega.wh1"
    ):
        adapted("scanned", dataclasses.replace(LORA, targets=("output.kernel",)))


@pytest.mark.parametrize("shared", [False, True])
def test_dropout_is_on_the_input_of_the_factors(shared):
    linears = [Linear(5, 7, rngs=nnx.Rngs(number)) for number in range(2)]
    for linear in linears:
        add_lora(
            linear,
            LoraConfig(rank=2, alpha=3.0, dropout=0.4, targets=("kernel",)),
            rngs=nnx.Rngs(3),
        )
    randomize(linears[1])
    x, key = jax.random.normal(jax.random.key(4), (3, 11, 5)), jax.random.key(5)
    inputs = SharedInput(x, *linears, dropout_key=key) if shared else x
    linear = linears[1]
    got = linear(inputs, dropout_key=None if shared else key)
    dropped = np.asarray(dropout(x, 0.4, fold_key(key, 1 if shared else 0)))
    assert 0.2 < (dropped == 0).mean() < 0.6
    w, a, b = (
        np.asarray(each[...], np.float64) for each in (linear.kernel, linear.lora_a, linear.lora_b)
    )
    np.testing.assert_allclose(got, x @ w + 1.5 * dropped @ a @ b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linear(x), x @ w + 1.5 * x @ a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scanned", "transformer"])
def test_every_layer_of_a_model_drops_other_inputs(name):
    model = adapted(name, dataclasses.replace(LORA, dropout=0.5))
    randomize(model)
    run = nnx.jit(lambda model, key: model(TOKENS, dropout_key=key).logits)
    first, second, again = (run(model, jax.random.key(seed)) for seed in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - run(merge_lora(model), jax.random.key(0))).max() > 1e-3


@pytest.mark.slow
def test_a_cache_streams_through_the_factors():
    model = adapted("scanned")
    randomize(model)
    cache = model.init_cache(2)
    run = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    first, cache = run(model, TOKENS[:, :6], cache)
    second, _ = run(model, TOKENS[:, 6:], cache)
    want = nnx.jit(lambda model: model(TOKENS).logits)(merge_lora(model))
    np.testing.assert_allclose(np.concatenate([first, second], 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_engine_takes_no_factors():
    """It reads kernels alone: factors would be lost without a word."""
    model = adapted("scanned")
    with pytest.raises(ValueError, match="the model has LoRA factors; merge them first"):
        prepare_decoding(model)
    prepare_decoding(merge_lora(model))
