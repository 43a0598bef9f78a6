"""Runs of supervised fine-tuning: the loss against float64, held-out loss, resumption, LoRA."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import megalodon_jax
from megalodon_jax.checkpoints import load_model
from megalodon_jax.config import LoraConfig, SftConfig, TrainConfig
from megalodon_jax.data import ByteTokenizer
from megalodon_jax.models import build_model
from megalodon_jax.tasks import find_task
from megalodon_jax.train_state import init_state
from megalodon_jax.training.loop import train
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch


def write_examples(path: Path, count: int, *, seed: int) -> str:
    rng = np.random.default_rng(seed)
    talks = [
        [
            {"role": "user", "content": "q" * int(rng.integers(1, 9))},
            {"role": "assistant", "content": "a" * int(rng.integers(1, 30))},
        ]
        for _ in range(count)
    ]
    pairs = [{"prompt": "p" * i, "response": "answer"[: i + 1]} for i in range(5)]
    records = [*({"messages": talk} for talk in talks), *pairs]
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


@pytest.fixture
def sft(session_config, tmp_path, short_prefetch, shared_compilation) -> TrainConfig:
    data = dataclasses.replace(
        session_config.data, files=(write_examples(tmp_path / "train.jsonl", 30, seed=0),),
        heldout_files=(write_examples(tmp_path / "heldout.jsonl", 9, seed=1),), seq_len=48,
    )  # fmt: skip
    return dataclasses.replace(
        session_config, run_dir=str(tmp_path / "run"), data=data, task="sft", sample_tokens=0,
        sft=SftConfig(chat_template="plain", too_long="truncate", max_length=41),
        final_eval_batches=64,
    )  # fmt: skip


def float64_loss(logits: np.ndarray, batch: Batch) -> tuple[float, float]:
    """Sum of -log p over the targets of responses, and their number, by definition."""
    scores = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
    chosen = np.take_along_axis(scores, np.asarray(batch.targets)[..., None], -1)[..., 0]
    weights = np.asarray(batch.weights, np.float64)
    return float(((log_z - chosen) * weights).sum()), float(weights.sum())


@pytest.mark.slow
def test_the_loss_is_the_mean_over_the_global_batch(sft):
    """Over all accumulated batches: not a mean of their means."""
    sft = dataclasses.replace(sft, optim=dataclasses.replace(sft.optim, accumulate_steps=3))
    loader, _ = find_task("sft").open_loaders(sft, ByteTokenizer(), rows=range(2), num_shards=1)
    batches = [next(loader) for _ in range(3)]
    loader.close()
    graphdef, state = init_state(sft)
    model = nnx.merge(graphdef, state.params)
    run = nnx.jit(lambda model, batch: model(batch.tokens, segment_ids=batch.segment_ids).logits)
    sums = [float64_loss(run(model, batch), batch) for batch in batches]
    total, count = np.sum(sums, axis=0)
    assert len({number for _, number in sums}) > 1
    assert 0 < count < sum((batch.segment_ids > 0).sum() for batch in batches)
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
    _, metrics = make_train_step(graphdef, sft)(state, stacked)
    assert float(metrics.tokens) == count
    assert float(metrics.loss) == pytest.approx(total / count, rel=1e-6)
    assert abs(np.mean([a / b for a, b in sums]) - total / count) > 1e-5 * total / count


@pytest.mark.slow
def test_a_run_and_its_heldout_loss(sft):
    result = train(sft)
    model, _ = load_model(sft.run_dir)
    _, heldout = find_task("sft").open_loaders(sft, ByteTokenizer(), rows=range(2), num_shards=1)
    run = nnx.jit(lambda model, batch: model(batch.tokens, segment_ids=batch.segment_ids).logits)
    sums = [float64_loss(run(model, batch), batch) for batch, _ in heldout[""].with_bytes()]
    heldout[""].close()
    total, count = np.sum(sums, axis=0)
    assert result.heldout is not None
    assert result.heldout.num_tokens == count
    assert result.heldout.loss == pytest.approx(total / count, rel=1e-5)
    assert np.isnan(result.heldout.bits_per_byte)
    lines = Path(sft.run_dir, "metrics.jsonl").read_text().splitlines()
    reports = [entry for entry in map(json.loads, lines) if "dropped_examples" in entry]
    assert len(reports) == 6
    assert {"bad_documents", "truncated_examples"} <= reports[-1].keys()


@pytest.mark.slow
def test_lora_on_conversations_resumes_bit_for_bit(sft, trained_run, tmp_path):
    sft = dataclasses.replace(
        sft, init_from=trained_run.run_dir, lora=LoraConfig(rank=2, dropout=0.2)
    )  # fmt: skip
    whole = train(sft)
    expected = megalodon_jax.load(sft.run_dir).model
    again = train(dataclasses.replace(sft, resume=True, resume_step=3))
    assert again[:2] == whole[:2]
    assert again.heldout is not None
    assert whole.heldout is not None
    assert again.heldout.loss == whole.heldout.loss
    chex.assert_trees_all_equal(
        nnx.state(megalodon_jax.load(sft.run_dir).model), nnx.state(expected)
    )
    fresh = build_model(sft.model, rngs=nnx.Rngs(0))
    assert jax.tree.structure(nnx.state(fresh)) == jax.tree.structure(nnx.state(expected))
