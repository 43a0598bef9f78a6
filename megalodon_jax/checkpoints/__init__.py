"""Checkpoints of a run: save, restore, and load a trained model."""

from megalodon_jax.checkpoints.load import (
    LoadedModel,
    TrainedModel,
    load_latest_valid,
    load_model,
    load_params,
    load_trained,
    save_model,
)
from megalodon_jax.checkpoints.manager import RestoredRun, RunCheckpoints

__all__ = [
    "LoadedModel",
    "RestoredRun",
    "RunCheckpoints",
    "TrainedModel",
    "load_latest_valid",
    "load_model",
    "load_params",
    "load_trained",
    "save_model",
]
