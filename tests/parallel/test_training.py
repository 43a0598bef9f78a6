"""Training on a mesh of eight devices against training on one device."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest

from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.presets import preset_names
from megalodon_jax.train_state import TrainState, init_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch

CONFIG = TrainConfig(
    model=ModelConfig(
        num_layers=2, model_dim=32, z_dim=16, value_dim=32, num_heads=2, ffn_hidden_dim=48,
        cema_ndim=4, chunk_size=8, vocab_size=64, norm_num_groups=4, norm_prior_count=3,
    ),
    data=DataConfig(batch_size=24, seq_len=64),
    loss_chunk_size=48,
    steps=100,
)  # fmt: skip
# Every preset with several devices, and every pair of axes.
MESHES = {
    **{name: MeshConfig.from_preset(name) for name in preset_names("meshes")},
    "replica, chunk": MeshConfig(replica=2, chunk=4),
    "replica, model": MeshConfig(replica=4, model=2),
    "released": MeshConfig.from_preset("released", data=4),
    "chunk, model": MeshConfig(chunk=4, model=2),
}
del MESHES["single"]
# The other meshes run their blocks in one scan.
UNROLLED = {"data", "fsdp", "all"}
STEPS = 10


def packed_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (1, 24, 65)).astype(np.int32)
    segment_ids = np.ones((1, 24, 64), np.int32)
    # Documents that begin anywhere and cross sequence shards, padding, and a row of padding.
    for row in range(24):
        for start in rng.integers(1, 64, row % 4):
            segment_ids[0, row, start:] += 1
    segment_ids[0, 5, 40:] = 0
    segment_ids[0, 11] = 0
    weights = (segment_ids > 0).astype(np.float32)
    return Batch(tokens[..., :-1], tokens[..., 1:], segment_ids, weights)


class Trained(NamedTuple):
    """A run: loss, z-loss and gradient norm per step, first gradients, final state, step."""

    metrics: np.ndarray
    gradients: dict[str, np.ndarray]
    state: TrainState
    step: jax.stages.Compiled


def train(mesh_config, scan_layers=True):
    model = dataclasses.replace(CONFIG.model, scan_layers=scan_layers)
    config = dataclasses.replace(CONFIG, model=model, mesh=mesh_config)
    devices = jax.devices()[:1] if mesh_config == MeshConfig() else None
    mesh = make_mesh(config.mesh, devices)
    graphdef, state = init_state(config, mesh)
    batch = packed_batch()
    step = make_train_step(graphdef, config, mesh).lower(state, batch).compile()
    logged, gradients = [], {}
    for i in range(STEPS):
        state, metrics = step(state, batch)
        logged.append([float(metrics.loss), float(metrics.z_loss), float(metrics.grad_norm)])
        if i == 0:
            # After one step the first moments are the gradients, multiplied by 1 - beta1.
            moments = optax.tree.get(state.opt_state, "mu")
            gradients = {
                jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
                for path, leaf in jax.tree.leaves_with_path(moments)
            }
    return Trained(np.array(logged), gradients, state, step)


@pytest.fixture(scope="module")
def single_device():
    return train(MeshConfig())


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_equals_one_device(name, single_device):
    sharded = train(MESHES[name], scan_layers=name not in UNROLLED)
    np.testing.assert_allclose(sharded.metrics[0], single_device.metrics[0], rtol=1e-5)
    for path, expected in single_device.gradients.items():
        error = np.linalg.norm(sharded.gradients[path] - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, path
    np.testing.assert_allclose(sharded.metrics, single_device.metrics, rtol=1e-4)
    sizes = sharded.state.step.sharding.mesh.shape
    for path, leaf in jax.tree.leaves_with_path(sharded.state.params):
        if leaf.ndim - ("layers" in jax.tree_util.keystr(path)) == 2 and leaf.size >= 1024:
            fraction = leaf.addressable_shards[0].data.size / leaf.size
            shards = sizes["data"] * sizes["chunk"] * sizes["model"]
            assert fraction == 1 / shards, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_a_checkpoint_restores_on_another_mesh(single_device, tmp_path):
    state = single_device.state
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state, loader_state={}, config=CONFIG, tokenizer_fingerprint="none")
        checkpoints.wait()
        other = dataclasses.replace(CONFIG, mesh=MeshConfig(data=4, model=2))
        restored = checkpoints.restore(STEPS, other).state
    for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert actual.sharding.mesh.size == 8
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_initial_values_do_not_depend_on_the_mesh():
    unsharded = init_state(CONFIG)[1]
    sharded = init_state(dataclasses.replace(CONFIG, mesh=MeshConfig(data=4, model=2)))[1]
    chex.assert_trees_all_equal(sharded, unsharded)
