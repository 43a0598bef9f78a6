"""Checkpoints of a run: save, restore, and load a trained model."""

from megalodon_jax.checkpoints.base_model import BaseRecord, LoadBase, check_same_base
from megalodon_jax.checkpoints.load import (
    LoadedModel,
    LoadedRun,
    LoadedWeights,
    TrainedModel,
    load_latest_valid,
    load_model,
    load_run,
    load_trained,
    load_weights,
    resolve_auto_resume,
    restore_for_resume,
    save_model,
)
from megalodon_jax.checkpoints.manager import RunCheckpoints
from megalodon_jax.checkpoints.manifest import Verification
from megalodon_jax.checkpoints.reading import RestoredRun
from megalodon_jax.checkpoints.tokenizer_files import load_run_tokenizer
from megalodon_jax.checkpoints.verify import CheckpointReport, verify_run

__all__ = [
    "BaseRecord",
    "CheckpointReport",
    "LoadBase",
    "LoadedModel",
    "LoadedRun",
    "LoadedWeights",
    "RestoredRun",
    "RunCheckpoints",
    "TrainedModel",
    "Verification",
    "check_same_base",
    "load_latest_valid",
    "load_model",
    "load_run",
    "load_run_tokenizer",
    "load_trained",
    "load_weights",
    "resolve_auto_resume",
    "restore_for_resume",
    "save_model",
    "verify_run",
]
