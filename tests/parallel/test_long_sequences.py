"""A row of 2^20 tokens, sharded over eight devices."""

import dataclasses

import jax
import numpy as np
import pytest

from megalodon_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.train_state import init_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch

LENGTH = 2**20
MODEL = ModelConfig(
    num_layers=1, model_dim=8, z_dim=8, value_dim=8, num_heads=1, ffn_hidden_dim=8, cema_ndim=2,
    chunk_size=64, vocab_size=16, norm_num_groups=2, remat="inputs",
)  # fmt: skip


def compiled_step(length, shards, width=8):
    sizes = dict.fromkeys(("model_dim", "z_dim", "value_dim", "ffn_hidden_dim"), width)
    config = TrainConfig(
        model=dataclasses.replace(MODEL, **sizes),
        data=DataConfig(batch_size=1, seq_len=length),
        mesh=MeshConfig(chunk=shards),
        loss_chunk_size=4096,
    )
    mesh = make_mesh(config.mesh, jax.devices()[:shards])
    tokens = np.random.default_rng(0).integers(0, 16, (1, 1, length + 1)).astype(np.int32)
    # Two documents; the second one begins within the sixth sequence shard.
    ids = 1 + (np.arange(length) > 0.7 * length).astype(np.int32)[None, None]
    batch = Batch(tokens[..., :-1], tokens[..., 1:], ids, np.ones(ids.shape, np.float32))
    graphdef, state = init_state(config, mesh)
    return make_train_step(graphdef, config, mesh).lower(state, batch).compile(), state, batch


@pytest.mark.slow
def test_a_million_tokens_train_and_memory_is_divided_by_the_devices():
    # Wider and shorter than the row that is trained: with width 8, FSDP's gradient scatters make
    # XLA for CPUs store a few of the many arrays of a token twice.
    steps = compiled_step(LENGTH // 16, 8, width=32), compiled_step(LENGTH // 128, 1, width=32)
    sizes = [step.memory_analysis().temp_size_in_bytes for step, *_ in steps]
    assert sizes[0] <= 1.1 * sizes[1]
    sharded, state, batch = compiled_step(LENGTH, 8)
    state, metrics = sharded(state, batch)
    # 16 equally probable tokens.
    assert abs(float(metrics.loss) - np.log(16)) < 1
    assert float(metrics.tokens) == LENGTH
    assert 0 < float(metrics.grad_norm) < np.inf
    assert int(state.step) == 1
