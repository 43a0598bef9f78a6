"""Parameter counts, initial values, dtypes, dropout and errors of the model."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from scipy import stats

from megalodon_jax.config import ModelConfig
from megalodon_jax.model import Megalodon
from tests.golden_files import relative_error

PARAMETERS = {
    "mega200M": 220_627_968,
    "mega1.3B": 1_342_832_640,
    "mega1.3B_pg19": 1_327_628_288,
    "mega7.1B": 7_117_381_632,
    "mega7.3B": 7_385_817_088,
    "paper_7b": 7_385_817_088,
}


def params_of(state: nnx.State) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str):
    config = ModelConfig.from_preset(name)
    abstract = nnx.eval_shape(lambda: Megalodon(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(abstract, nnx.Param))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == PARAMETERS[name]


def test_every_parameter_names_its_axes():
    abstract = nnx.eval_shape(
        lambda: Megalodon(ModelConfig.from_preset("mega1.3B"), rngs=nnx.Rngs(0))
    )
    for path, variable in nnx.to_flat_state(nnx.state(abstract, nnx.Param)):
        names = variable.get_metadata("out_sharding")
        assert len(names) == len(variable.shape), path
        assert (names[0] == "layers") == (path[0] == "layers"), path


@pytest.mark.parametrize("mode", ["he", "xavier", "bert", "gaussian"])
def test_initial_values(mode: str):
    config = ModelConfig(
        num_layers=3, model_dim=96, z_dim=32, value_dim=128, ffn_hidden_dim=160, chunk_size=16,
        vocab_size=500, norm_num_groups=4, rescale_nffn=True, init_mode=mode,
    )  # fmt: skip
    create = jax.jit(lambda: nnx.state(Megalodon(config, rngs=nnx.Rngs(0)), nnx.Param))
    params = params_of(create())
    kernel = np.asarray(params["layers.mega.wv.kernel"])
    deviation = {
        "he": (3 * 96) ** -0.5,
        "xavier": (2 / (96 + 128)) ** 0.5,
        "bert": 0.02,
        # Truncation at 3 sigma reduces the standard deviation to 0.9866.
        "gaussian": stats.truncnorm.std(-3, 3),
    }[mode]
    assert abs(kernel.std() / deviation - 1) < 0.02
    if mode == "xavier":
        assert np.abs(kernel).max() <= (6 / (96 + 128)) ** 0.5
    assert not np.array_equal(kernel[0], kernel[1])
    for name in ("embed.embedding", "output.kernel"):
        values = np.asarray(params[name])
        assert abs(values.std() * 96**0.5 / stats.truncnorm.std(-3, 3) - 1) < 0.02
        assert np.abs(values).max() <= 3 / 96**0.5
    for name, value in params.items():
        if name.endswith(("bias", "weight", "mega.gamma", "mega.beta")):
            assert not np.any(value), name
    np.testing.assert_allclose(params["layers.nffn.alpha"][:, 0], [0.1, 0.05, 0.025])

    gamma = np.asarray(params["layers.mega.cema.gamma"])
    assert not np.any(gamma[..., 1])
    assert abs(gamma[..., 0].std() - 1) < 0.05
    for name in ("alpha", "delta"):
        assert abs(np.asarray(params[f"layers.mega.cema.{name}"]).std() - 0.2) < 0.01
    frequencies = jax.nn.sigmoid(params["layers.mega.cema.theta"])
    expected = np.exp(-np.log(96) / 96 * np.arange(96, 0, -1))
    for layer in frequencies:
        np.testing.assert_allclose(np.sort(layer), expected, rtol=1e-4)
    omega = np.asarray(params["layers.mega.cema.omega"])
    assert abs(omega.std() / 0.25 - 1) < 0.15
    assert np.abs(omega).max() <= 1


def test_dtypes():
    config = ModelConfig(
        num_layers=1, model_dim=16, z_dim=8, value_dim=16, ffn_hidden_dim=16, chunk_size=8,
        vocab_size=30, norm_num_groups=4, dtype="bfloat16", param_dtype="bfloat16",
    )  # fmt: skip
    model = Megalodon(config, rngs=nnx.Rngs(0))
    for name, value in params_of(nnx.state(model, nnx.Param)).items():
        assert value.dtype == (jnp.float32 if ".cema." in name else jnp.bfloat16), name
    tokens = jnp.zeros((2, 11), jnp.int32)
    hidden, cache = jax.eval_shape(lambda: model.hidden(tokens, cache=model.init_cache(2)))
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(model.logits, hidden).dtype == jnp.float32
    assert cache is not None
    (layer, *_) = cache.layers
    assert layer.norm.mean.dtype == cache.final_norm.var.dtype == jnp.float32
    assert layer.cema.dtype == jnp.float32
    assert layer.keys_and_values.key.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "rates",
    [
        {"dropout": 0.3},
        {"hidden_dropout": 0.3},
        {"attention_dropout": 0.3},
        {"attention_dropout": 0.3, "attention_dropout_mode": "dropkey"},
    ],
)
def test_dropout(rates: dict):
    config = ModelConfig(
        num_layers=2, model_dim=16, z_dim=8, value_dim=16, ffn_hidden_dim=16, chunk_size=8,
        vocab_size=30, norm_num_groups=4, implementation="reference", **rates,
    )  # fmt: skip
    model = Megalodon(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)

    @jax.jit
    def call(state, key=None):
        return nnx.merge(graphdef, state)(tokens, dropout_key=key).logits

    without = call(state)
    first, again, second = (call(state, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert relative_error(first, without) > 1e-3
    assert relative_error(second, first) > 1e-3


@pytest.mark.slow
def test_unrolled_blocks_equal_the_scan(small_model: Megalodon):
    state = nnx.state(small_model)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 21)).astype(np.int32)

    def run(scan_layers: bool):
        config = dataclasses.replace(small_model.config, scan_layers=scan_layers, dropout=0.3)
        abstract = nnx.eval_shape(lambda: Megalodon(config, rngs=nnx.Rngs(0)))

        @jax.jit
        def call(state: nnx.State):
            model = nnx.merge(nnx.graphdef(abstract), state)
            key = jax.random.key(3)
            return model(jnp.asarray(tokens), cache=model.init_cache(2), dropout_key=key)

        return jax.tree.leaves(call(state))

    for unrolled, scanned in zip(run(False), run(True), strict=True):
        np.testing.assert_allclose(unrolled, scanned, rtol=1e-4, atol=1e-5)


def test_errors(small_model: Megalodon):
    with pytest.raises(ValueError, match=r"token ids run from 3 to 61.*0 to 60"):
        small_model(np.array([[3, 61]], np.int32))
    with pytest.raises(ValueError, match=r"token ids run from -1"):
        small_model(np.array([[-1, 3]], np.int32))
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        small_model(np.zeros(5, np.int32))
    with pytest.raises(ValueError, match=r"shape \(2, 0\)"):
        small_model(np.zeros((2, 0), np.int32))


def test_importing_needs_no_data_library():
    script = (
        "import sys, megalodon_jax, megalodon_jax.model, megalodon_jax.training.step\n"
        "heavy = {'grain', 'tensorflow_datasets', 'tensorflow', 'torch', 'pyarrow', 'tokenizers',"
        " 'orbax', 'tensorboardX', 'tyro'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
