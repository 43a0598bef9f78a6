"""A Transformer in the trainer: train, resume, evaluate, generate; plans for GPUs and TPUs."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.checkpoints import load_model, load_trained
from megalodon_jax.cli.main import main
from megalodon_jax.compiled import topologies
from megalodon_jax.config import DataConfig, TrainConfig, TransformerConfig, load_config
from megalodon_jax.evaluation.streaming import evaluate_documents
from megalodon_jax.loss import cross_entropy
from megalodon_jax.plan.plan import make_plan
from megalodon_jax.training.loop import train

MODEL = TransformerConfig(
    num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, ffn_hidden_dim=24, vocab_size=257
)


@pytest.fixture
def run(shared_compilation, short_prefetch, config) -> TrainConfig:
    return dataclasses.replace(config, model=MODEL)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path):
    optim = dataclasses.replace(run.optim, schedule="constant")
    run = dataclasses.replace(run, optim=optim, sample_tokens=0, final_eval_batches=1)
    whole = dataclasses.replace(run, run_dir=str(tmp_path / "whole"))
    result = train(whole)
    assert result.step == 6
    assert result.heldout is not None
    train(dataclasses.replace(run, steps=3))
    assert train(dataclasses.replace(run, resume=True)).step == 6
    states = (nnx.state(load_model(each.run_dir).model) for each in (whole, run))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_evaluation_and_generation_from_a_run(run, capsys):
    train(run)
    model, tokenizer = load_trained(run.run_dir)
    text = "document 3: ab cab c" * 20
    result = evaluate_documents(model, tokenizer, [text], batch_size=1, piece_length=64)
    ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(text), [tokenizer.eos_id]])
    tokens, targets = ids[None, :-1].astype(np.int32), ids[None, 1:].astype(np.int32)
    # The cache grew from 128 slots to 512.
    hidden = model.hidden(tokens).hidden
    sums = cross_entropy(hidden, model.output_matrix(), targets, np.ones(targets.shape, "f4"))
    assert result.num_tokens == targets.size > 256
    np.testing.assert_allclose(result.loss, sums.loss_sum / targets.size, rtol=1e-5)
    capsys.readouterr()
    arguments = [run.run_dir, "document", "--max_tokens", "5"]
    assert main(["generate", *arguments, "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("document")


def test_kind_comes_from_the_preset_or_the_file(tmp_path, monkeypatch):
    from megalodon_jax.cli.main import parse
    from megalodon_jax.cli.run_config import to_config

    command = parse(["train", "first_run", "--model.preset", "transformer30M"])
    config = to_config(command.settings)  # type: ignore[attr-defined]
    assert config.model == TransformerConfig.from_preset("transformer30M")
    file = tmp_path / "run.toml"
    file.write_text('[model]\nkind = "transformer"\nattention_window = 512\nrope_base = "none"\n')
    assert load_config(file).model == TransformerConfig(attention_window=512, rope_base=None)
    command = parse(["train", str(file), "--model.attention_window", "none"])
    config = to_config(command.settings)  # type: ignore[attr-defined]
    assert config.model == TransformerConfig(rope_base=None)
    with pytest.raises(SystemExit):
        parse(["train", str(file), "--model.chunk_size", "64"])


TOPOLOGIES = [
    pytest.param(
        "h100:1",
        "cudnn",
        marks=pytest.mark.skipif(
            not topologies.has_cuda_compiler(),
            reason="jax-cuda13-plugin is not installed: pip install -e '.[aot]'",
        ),
    ),
    pytest.param(
        "v5e:1x1",
        "splash",
        marks=pytest.mark.skipif(
            not topologies.has_tpu_compiler(),
            reason="libtpu is not installed: pip install -e '.[aot]'",
        ),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "implementation"), TOPOLOGIES)
def test_plans_count_the_attention_of_the_target(topology, implementation):
    model = TransformerConfig(
        num_layers=2, model_dim=256, num_heads=2, ffn_hidden_dim=256, vocab_size=256,
        dtype="bfloat16",
    )  # fmt: skip
    config = TrainConfig(
        model=model, data=DataConfig(batch_size=2, seq_len=1024), loss_chunk_size=512
    )
    plan = make_plan(config, topologies.find_devices(topology))
    assert plan.fits
    assert plan.implementations["attention"].startswith(f"{implementation} (")
    # The backward pass computes scores again, in splash attention twice. Further passes over
    # documents count nothing. The TPU's compiler repeats some of these small products.
    attention = 4 * 512.5 * 256 * model.num_layers
    again = {"cudnn": 0.5, "splash": 1.5}[implementation] * attention
    expected = plan.model_flops_per_token + again
    repeated = {"cudnn": 1.01, "splash": 1.15}[implementation]
    assert expected * 0.999 < plan.compiled_flops_per_token < expected * repeated
