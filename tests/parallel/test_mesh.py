"""Mesh sizes, sharding rules, and errors about runs that a mesh cannot shard."""

import dataclasses

import jax
import pytest

from megalodon_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.parallel.mesh import mesh_sizes, resolve_mesh
from megalodon_jax.parallel.sharding import partition_spec

MODEL = ModelConfig(
    model_dim=32, z_dim=16, value_dim=32, num_heads=2, ffn_hidden_dim=48, chunk_size=8,
    vocab_size=64, norm_num_groups=4,
)  # fmt: skip


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
    config = TrainConfig(model=MODEL, data=DataConfig(batch_size=3, seq_len=40))
    with pytest.raises(ConfigError, match=r"batch_size 3 .* mesh\.data = 2.*20 tokens per device"):
        resolve_mesh(dataclasses.replace(config, mesh=MeshConfig(data=2, chunk=2, model=2)))
    with pytest.raises(ConfigError, match=r"num_heads 2 does not divide by mesh\.model = 8"):
        resolve_mesh(TrainConfig(model=MODEL, mesh=MeshConfig(model=8)))


def test_sharding_rules():
    assert partition_spec("layers", "embed", "value") == jax.sharding.PartitionSpec(
        (), ("data", "chunk"), "model"
    )
    with pytest.raises(ValueError, match="'value' and 'ffn' of one array both map to mesh axis"):
        partition_spec("value", "ffn")
    with pytest.raises(ValueError, match="no rule for logical axis 'heigth'"):
        partition_spec("heigth")
