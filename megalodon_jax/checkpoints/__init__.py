"""Checkpoints of a run: save, restore, and load a trained model."""

from megalodon_jax.checkpoints.load import (
    LoadedModel,
    LoadedRun,
    TrainedModel,
    load_latest_valid,
    load_model,
    load_params,
    load_run,
    load_trained,
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
    "CheckpointReport",
    "LoadedModel",
    "LoadedRun",
    "RestoredRun",
    "RunCheckpoints",
    "TrainedModel",
    "Verification",
    "load_latest_valid",
    "load_model",
    "load_params",
    "load_run",
    "load_run_tokenizer",
    "load_trained",
    "resolve_auto_resume",
    "restore_for_resume",
    "save_model",
    "verify_run",
]
