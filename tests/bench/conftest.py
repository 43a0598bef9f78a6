"""Small models for the benchmarks of training steps: compilation is nearly all of their time."""

import dataclasses

import pytest

from megalodon_jax.bench import agreement, scaling, train


@pytest.fixture
def smaller_model(monkeypatch):
    """One layer, and the reference implementations, whose recurrences compile soonest."""

    def smaller(config):
        config = train.small(config)
        model = dataclasses.replace(
            config.model,
            num_layers=1,
            cema_implementation="reference",
            timestep_norm_implementation="reference",
        )
        return dataclasses.replace(config, model=model)

    monkeypatch.setattr(scaling, "small", smaller)
    monkeypatch.setattr(agreement, "small", smaller)
