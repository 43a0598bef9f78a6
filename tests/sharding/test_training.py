"""Training over a mesh of eight devices against training on one."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest

from megalodon_jax.config import ConfigError, DataConfig, MeshConfig, ModelConfig, TrainConfig
from megalodon_jax.sharding import make_mesh, mesh_sizes, spec_of
from megalodon_jax.training.checkpoint import RunCheckpoints
from megalodon_jax.training.step import init_state, make_train_step, mesh_of
from megalodon_jax.typing import Batch

CONFIG = TrainConfig(
    model=ModelConfig(
        num_layers=2, model_dim=32, z_dim=16, value_dim=32, num_heads=2, ffn_hidden_dim=48,
        cema_ndim=4, chunk_size=8, vocab_size=64, norm_num_groups=4, norm_prior_count=3,
    ),
    data=DataConfig(batch_size=4, seq_len=32),
    loss_chunk_size=16,
    steps=20,
)  # fmt: skip
MESHES = {
    "replica+fsdp": {"replica": 2, "data": 2},
    "chunk": {"chunk": 4},
    "fsdp+chunk+model": {"data": 2, "chunk": 2, "model": 2},
}
STEPS = 3


def packed_batch(batch_size=4):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (1, batch_size, 33)).astype(np.int32)
    segment_ids = np.ones((1, batch_size, 32), np.int32)
    # Documents that begin anywhere, cross the borders between devices, and padding.
    segment_ids[0, 1, 9:] += 1
    segment_ids[0, 1, 21:] += 1
    segment_ids[0, 2, 3:] += 1
    segment_ids[0, 3, 20:] = 0
    weights = (segment_ids > 0).astype(np.float32)
    return Batch(tokens[..., :-1], tokens[..., 1:], segment_ids, weights)


def train(sizes, batch):
    """Losses, gradient norms and weights after some steps; the compiled step; the state."""
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(**sizes))
    devices = jax.devices()[: int(np.prod([1, *sizes.values()]))]
    mesh = make_mesh(config.mesh, devices)
    graphdef, state = init_state(config, mesh)
    step = make_train_step(graphdef, config, mesh).lower(state, batch).compile()
    numbers = []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        numbers.append([float(metrics.loss), float(metrics.z_loss), float(metrics.grad_norm)])
    return np.array(numbers), state, step


def first_moments(state):
    return optax.tree.get(state.opt_state, "mu")


@pytest.fixture(scope="module")
def alone():
    return train({}, packed_batch())


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_equals_one_device(name, alone):
    numbers, state, step = train(MESHES[name], packed_batch())
    due, due_state, _ = alone
    np.testing.assert_allclose(numbers, due, rtol=1e-5)
    # The first moments are sums of gradients.
    pairs = zip(*(jax.tree.leaves_with_path(first_moments(s)) for s in (state, due_state)))
    for (path, mine), (_, expected) in pairs:
        mine, expected = np.asarray(mine, np.float64), np.asarray(expected, np.float64)
        error = np.linalg.norm(mine - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, jax.tree_util.keystr(path)
    sizes = MESHES[name]
    if sizes.get("data", 1) * sizes.get("model", 1) > 1:
        for leaf in jax.tree.leaves(state.params):
            if leaf.size >= 1024:
                assert leaf.addressable_shards[0].data.size < leaf.size
    kinds = set(re.findall(r" (all-gather|all-reduce|all-to-all)(?:-start)?\(", step.as_text()))
    assert "all-reduce" in kinds


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_that_of_another(alone, tmp_path):
    _, state, _ = alone
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
        mesh_of(dataclasses.replace(config, mesh=MeshConfig(data=2, chunk=2, model=2)))
    with pytest.raises(ConfigError, match=r"num_heads 2 does not divide by mesh\.model = 8"):
        mesh_of(dataclasses.replace(CONFIG, mesh=MeshConfig(model=8)))


def test_rules():
    assert spec_of(("layers", "embed", "value")) == jax.sharding.PartitionSpec((), "data", "model")
    with pytest.raises(ValueError, match="'value' and 'ffn' of one array both go to mesh axis"):
        spec_of(("value", "ffn"))
    with pytest.raises(ValueError, match="no rule for logical axis 'heigth'"):
        spec_of(("heigth",))
