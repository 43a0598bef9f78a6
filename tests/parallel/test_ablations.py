"""Ablations on a mesh of four devices against one device: training, and a sharded cache."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh

from megalodon_jax.cache import cache_shardings
from megalodon_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from megalodon_jax.model import Megalodon
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.parallel.sharding import batch_sharding, shardings_of
from megalodon_jax.train_state import init_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch
from tests.ablations import VARIANTS
from tests.golden_files import relative_error

MODEL = ModelConfig(
    num_layers=2, model_dim=16, z_dim=8, value_dim=16, num_heads=2, ffn_hidden_dim=24,
    cema_ndim=3, chunk_size=8, vocab_size=32, norm_num_groups=4,
)  # fmt: skip
MESHES = {"chunk, model": MeshConfig(chunk=2, model=2), "data, chunk": MeshConfig(data=2, chunk=2)}


def batch() -> Batch:
    """Packed rows: documents across the border of the sequence shards (16), padding."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 32, (1, 4, 33)).astype(np.int32)
    segment_ids = np.ones((1, 4, 32), np.int32)
    segment_ids[0, 1, 7:] = 2
    segment_ids[0, 2, 13:], segment_ids[0, 2, 19:] = 2, 3
    segment_ids[0, 3, 25:] = 0
    weights = (segment_ids > 0).astype(np.float32)
    return Batch(tokens[..., :-1], tokens[..., 1:], segment_ids, weights)


def train(name: str, mesh_config: MeshConfig) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses of three steps, and the parameters after them."""
    model = dataclasses.replace(MODEL, **VARIANTS[name])
    config = TrainConfig(
        model=model, mesh=mesh_config, data=DataConfig(batch_size=4, seq_len=32), steps=100,
        loss_chunk_size=64,
    )  # fmt: skip
    num_devices = 4 if mesh_config != MeshConfig() else 1
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    graphdef, state = init_state(config, mesh)
    step, losses = make_train_step(graphdef, config, mesh), []
    for _ in range(3):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    leaves = jax.tree.leaves_with_path(state.params)
    return losses, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("all, ema", "chunk, model"),
        ("all, ema", "data, chunk"),
        ("all, no average", "chunk, model"),
    ],
)
def test_training_equals_one_device(name: str, mesh: str):
    expected_losses, expected = train(name, MeshConfig())
    losses, params = train(name, MESHES[mesh])
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for path, value in expected.items():
        np.testing.assert_allclose(params[path], value, rtol=0, atol=2e-5, err_msg=path)


def on_mesh(model: Megalodon, mesh: Mesh) -> Megalodon:
    graphdef, params = nnx.split(model, nnx.Param)
    return nnx.merge(graphdef, jax.device_put(params, shardings_of(params, mesh)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all, ema", "layer norm"])
def test_features_of_packed_rows_equal_those_of_one_device(name: str):
    model = Megalodon(dataclasses.replace(MODEL, **VARIANTS[name]), rngs=nnx.Rngs(0))
    tokens, segment_ids = jnp.asarray(batch().tokens[0]), jnp.asarray(batch().segment_ids[0])
    call = nnx.jit(lambda model, *args: model.hidden(args[0], segment_ids=args[1]).hidden)
    expected = np.asarray(call(model, tokens, segment_ids))
    mesh = make_mesh(MESHES["chunk, model"], jax.devices()[:4])
    with jax.set_mesh(mesh):
        inputs = jax.device_put((tokens, segment_ids), batch_sharding(mesh))
        found = np.asarray(call(on_mesh(model, mesh), *inputs))
    is_token = np.asarray(segment_ids) > 0
    assert relative_error(found[is_token], expected[is_token]) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all, ema", "all, no average"])
def test_a_sharded_cache_equals_an_unsharded_one(name: str):
    model = Megalodon(dataclasses.replace(MODEL, **VARIANTS[name]), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (4, 22)), jnp.int32)
    call = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache))

    def stream(model, cache):
        first, cache = call(model, tokens[:, :11], cache)
        second, cache = call(model, tokens[:, 11:], cache)
        return jnp.concatenate([first, second], axis=1), cache

    expected, _ = stream(model, model.init_cache(4))
    mesh = make_mesh(MeshConfig(data=2, model=2), jax.devices()[:4])
    shardings = cache_shardings(mesh, model.config)
    with jax.set_mesh(mesh):
        logits, cache = stream(on_mesh(model, mesh), jax.device_put(model.init_cache(4), shardings))
    assert relative_error(logits, expected) <= 2e-6
    for leaf, sharding in zip(jax.tree.leaves(cache), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
