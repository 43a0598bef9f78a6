"""Training over a mesh of eight devices against training on one."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest

from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.parallel.mesh import make_mesh, mesh_sizes, resolve_mesh
from megalodon_jax.parallel.sharding import partition_spec
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
    steps=20,
)  # fmt: skip
# Every preset that has several devices, and every two axes.
MESHES = {
    **{name: MeshConfig.from_preset(name) for name in preset_names("meshes")},
    "replica, chunk": MeshConfig(replica=2, chunk=4),
    "replica, model": MeshConfig(replica=4, model=2),
    "released": MeshConfig.from_preset("released", data=4),
    "chunk, model": MeshConfig(chunk=4, model=2),
}
del MESHES["single"]
# The others run their blocks in one loop.
WRITTEN_OUT = {"data", "fsdp", "all"}
STEPS = 10


def packed_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (1, 24, 65)).astype(np.int32)
    segment_ids = np.ones((1, 24, 64), np.int32)
    # Documents that begin anywhere and cross the borders between devices; padding; a row of it.
    for row in range(24):
        for start in rng.integers(1, 64, row % 4):
            segment_ids[0, row, start:] += 1
    segment_ids[0, 5, 40:] = 0
    segment_ids[0, 11] = 0
    weights = (segment_ids > 0).astype(np.float32)
    return Batch(tokens[..., :-1], tokens[..., 1:], segment_ids, weights)


class Trained(NamedTuple):
    """Loss, z-loss and gradient norm of every step; gradients; the state; the compiled step."""

    numbers: np.ndarray
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
    numbers, gradients = [], {}
    for i in range(STEPS):
        state, metrics = step(state, batch)
        numbers.append([float(metrics.loss), float(metrics.z_loss), float(metrics.grad_norm)])
        if i == 0:
            # After a step the first moments are the gradients, all times one number.
            moments = optax.tree.get(state.opt_state, "mu")
            gradients = {
                jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
                for path, leaf in jax.tree.leaves_with_path(moments)
            }
    return Trained(np.array(numbers), gradients, state, step)


@pytest.fixture(scope="module")
def alone():
    return train(MeshConfig())


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_equals_one_device(name, alone):
    split = train(MESHES[name], scan_layers=name not in WRITTEN_OUT)
    np.testing.assert_allclose(split.numbers[0], alone.numbers[0], rtol=1e-5)
    for path, due in alone.gradients.items():
        error = np.linalg.norm(split.gradients[path] - due) / np.linalg.norm(due)
        assert error <= 1e-5, path
    np.testing.assert_allclose(split.numbers, alone.numbers, rtol=1e-4)
    sizes = split.state.step.sharding.mesh.shape
    for path, leaf in jax.tree.leaves_with_path(split.state.params):
        if leaf.ndim - ("layers" in jax.tree_util.keystr(path)) == 2 and leaf.size >= 1024:
            share = leaf.addressable_shards[0].data.size / leaf.size
            assert share == 1 / (sizes["data"] * sizes["model"]), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_that_of_another(alone, tmp_path):
    state = alone.state
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state, loader_state={}, config=CONFIG, tokenizer_fingerprint="none")
        checkpoints.wait()
        split = dataclasses.replace(CONFIG, mesh=MeshConfig(data=4, model=2))
        restored = checkpoints.restore(STEPS, split).state
    for mine, due in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert mine.sharding.mesh.size == 8
        np.testing.assert_array_equal(mine, due)


def test_start_values_do_not_depend_on_the_mesh():
    one = init_state(CONFIG)[1]
    split = init_state(dataclasses.replace(CONFIG, mesh=MeshConfig(data=4, model=2)))[1]
    for mine, due in zip(jax.tree.leaves(split), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(mine, due)


def test_mesh_sizes():
    assert mesh_sizes(MeshConfig(data=-1, model=2), 8) == {
        "replica": 1, "data": 4, "chunk": 1, "model": 2,
    }  # fmt: skip
    assert mesh_sizes(MeshConfig(), 8)["data"] == 1
    with pytest.raises(ConfigError, match="8 devices do not divide by 3"):
        mesh_sizes(MeshConfig(data=-1, model=3), 8)
    with pytest.raises(ConfigError, match="needs 16 devices, there are 8"):
        mesh_sizes(MeshConfig(data=16), 8)
    with pytest.raises(ConfigError, match="uses 4 of 8 devices"):
        mesh_sizes(MeshConfig(data=4), 8)
    with pytest.raises(ConfigError, match="-1 more than once"):
        MeshConfig(data=-1, model=-1)


def test_every_size_that_does_not_divide_is_named():
    config = dataclasses.replace(CONFIG, data=DataConfig(batch_size=3, seq_len=40))
    with pytest.raises(ConfigError, match=r"batch_size 3 .* mesh\.data = 2.*20 tokens a device"):
        resolve_mesh(dataclasses.replace(config, mesh=MeshConfig(data=2, chunk=2, model=2)))
    with pytest.raises(ConfigError, match=r"num_heads 2 does not divide by mesh\.model = 8"):
        resolve_mesh(dataclasses.replace(CONFIG, mesh=MeshConfig(model=8)))


def test_rules():
    assert partition_spec(("layers", "embed", "value")) == jax.sharding.PartitionSpec(
        (), "data", "model"
    )
    with pytest.raises(ValueError, match="'value' and 'ffn' of one array both go to mesh axis"):
        partition_spec(("value", "ffn"))
    with pytest.raises(ValueError, match="no rule for logical axis 'heigth'"):
        partition_spec(("heigth",))
