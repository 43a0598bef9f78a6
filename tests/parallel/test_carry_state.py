"""Rows that continue each other (`data.carry_state`) on meshes of eight devices and on one."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import pytest

from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.train_state import TrainState, init_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch

ROWS, LENGTH, STEPS = 8, 27, 3
CONFIG = TrainConfig(
    model=ModelConfig(
        num_layers=2, model_dim=32, z_dim=16, value_dim=32, num_heads=2, ffn_hidden_dim=48,
        cema_ndim=4, chunk_size=8, vocab_size=64, norm_num_groups=4, norm_prior_count=3,
    ),
    data=DataConfig(batch_size=ROWS, seq_len=LENGTH, carry_state=True),
    loss_chunk_size=48,
    steps=100,
)  # fmt: skip
MESHES = {
    "data, model": (MeshConfig(data=4, model=2), True),
    "fsdp": (MeshConfig(data=8), False),
}


def batches() -> list[Batch]:
    """Batches whose rows continue each other, but for some that start a document."""
    random = np.random.default_rng(0)
    found = []
    for step in range(STEPS):
        tokens = random.integers(0, 64, (1, ROWS, LENGTH + 1)).astype(np.int32)
        segment_ids = np.full((1, ROWS, LENGTH), 1 if step else 2, np.int32)
        segment_ids[0, step] = 2
        for row in range(0, ROWS, 3):
            segment_ids[0, row, random.integers(1, LENGTH) :] += 1
        weights = np.ones((1, ROWS, LENGTH), np.float32)
        found.append(Batch(tokens[..., :-1], tokens[..., 1:], segment_ids, weights))  # type: ignore[arg-type]
    return found


class Trained(NamedTuple):
    """Metrics of every step, and the state after the last one."""

    metrics: np.ndarray
    state: TrainState


def train(mesh_config: MeshConfig, *, scan_layers: bool = True) -> Trained:
    model = dataclasses.replace(CONFIG.model, scan_layers=scan_layers)
    config = dataclasses.replace(CONFIG, model=model, mesh=mesh_config)
    devices = jax.devices()[:1] if mesh_config == MeshConfig() else None
    mesh = make_mesh(config.mesh, devices)
    graphdef, state = init_state(config, mesh)
    step = make_train_step(graphdef, config, mesh)
    logged = []
    for batch in batches():
        state, metrics = step(state, batch)
        logged.append([float(metrics.loss), float(metrics.grad_norm), float(metrics.carried)])
    return Trained(np.array(logged), state)


@pytest.fixture(scope="module")
def single_device() -> Trained:
    return train(MeshConfig())


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_equals_one_device(name, single_device, tmp_path):
    mesh_config, scan_layers = MESHES[name]
    sharded = train(mesh_config, scan_layers=scan_layers)
    np.testing.assert_allclose(sharded.metrics, single_device.metrics, rtol=1e-4)
    np.testing.assert_allclose(sharded.metrics[0], single_device.metrics[0], rtol=1e-5)
    assert 0.5 < sharded.metrics[-1, 2] < 1.0
    carried, expected = (run.state.carried for run in (sharded, single_device))
    assert carried is not None
    assert expected is not None
    # Weights of later steps differ by rounding, so that only the sizes of the states agree closely.
    pairs = zip(
        jax.tree.leaves(carried.with_layout(stacked=True)), jax.tree.leaves(expected), strict=True
    )
    for actual, wanted in pairs:
        error = np.linalg.norm(np.asarray(actual) - wanted)
        assert error <= 1e-3 * np.linalg.norm(np.asarray(wanted))
    # Every device holds its rows, and its heads and channels, only.
    rows_per_device = ROWS // (mesh_config.replica * mesh_config.data)
    layers = carried.layers if scan_layers else carried.layers[0]
    key = layers.keys_and_values.key
    assert key.addressable_shards[0].data.shape[-4:-2] == (
        rows_per_device, 2 // mesh_config.model,
    )  # fmt: skip
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(
            sharded.state,
            loader_state={},
            config=dataclasses.replace(
                CONFIG, model=dataclasses.replace(CONFIG.model, scan_layers=scan_layers)
            ),
            tokenizer_fingerprint="none",
        )
        checkpoints.wait()
        other = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, model=2, replica=2))
        restored = checkpoints.restore(STEPS, other).state.carried
    assert restored is not None
    pairs = zip(
        jax.tree.leaves(restored), jax.tree.leaves(carried.with_layout(stacked=True)), strict=True
    )
    for actual, saved in pairs:
        assert actual.sharding.mesh.shape["replica"] == 2
        np.testing.assert_array_equal(actual, saved)
