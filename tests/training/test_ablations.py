"""Every ablation trains; one is saved, evaluated and restored like any other model."""

import dataclasses

import jax
import numpy as np
import pytest

from megalodon_jax.checkpoints import load_model
from megalodon_jax.config import OptimConfig
from megalodon_jax.data import ByteTokenizer
from megalodon_jax.evaluation.streaming import evaluate_documents
from megalodon_jax.train_state import init_state
from megalodon_jax.training.loop import train
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch
from tests.ablations import VARIANTS


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_falls(name: str, session_config):
    config = dataclasses.replace(
        session_config,
        model=dataclasses.replace(session_config.model, **VARIANTS[name]),
        optim=OptimConfig(lr=1e-2, warmup_steps=0, schedule="constant"),
    )
    graphdef, state = init_state(config)
    step = make_train_step(graphdef, config)
    tokens = np.tile(np.arange(1, 18, dtype=np.int32), (1, 2, 1))
    segment_ids = np.repeat([[[1, 2], [1, 1]]], 8, axis=-1).astype(np.int32)
    batch = Batch(tokens[..., :-1], tokens[..., 1:], segment_ids, np.ones((1, 2, 16), np.float32))
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        assert np.isfinite(float(metrics.grad_norm))
    assert losses[-1] < losses[0] - 0.5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_a_run_is_saved_sampled_and_evaluated(config):
    """The final sample of `train` streams too."""
    model = dataclasses.replace(config.model, **VARIANTS["all, no average"])
    config = dataclasses.replace(config, model=model)
    train(config)
    restored, saved = load_model(config.run_dir)
    assert saved.model == model
    assert saved.model.rope_base is None
    texts = ["The quick brown fox jumps over the lazy dog", "hello"]
    losses = [
        evaluate_documents(restored, ByteTokenizer(), texts, batch_size=2, piece_length=n).loss
        for n in (5, 64)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
