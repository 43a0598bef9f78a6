"""Small models for the benchmarks of steps: compilation is nearly all of their time."""

import dataclasses

import pytest

from megalodon_jax.bench import agreement, decode, scaling, train
from megalodon_jax.config import ModelConfig


@pytest.fixture
def smaller_model(monkeypatch):
    """`--small` with one layer, and the reference implementations, which compile soonest."""
    small = train.small

    def smaller(config):
        config = small(config)
        soonest = {"cema_implementation": "reference", "timestep_norm_implementation": "reference"}
        options = soonest if isinstance(config.model, ModelConfig) else {}
        model = dataclasses.replace(config.model, num_layers=1, **options)
        return dataclasses.replace(config, model=model)

    for benchmark in (train, scaling, agreement, decode):
        monkeypatch.setattr(benchmark, "small", smaller)
