"""Runs with LoRA: what is trained and saved, resumption, the base, every use of such a run."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import megalodon_jax
from megalodon_jax.checkpoints import RunCheckpoints, load_model
from megalodon_jax.config import LoraConfig, MeshConfig, OptimConfig, TrainConfig
from megalodon_jax.errors import ConfigError, ConvertError, MismatchError
from megalodon_jax.inference.sampling_params import SamplingParams
from megalodon_jax.interop.convert import convert
from megalodon_jax.lora import has_lora, linear_kernels, merge_lora
from megalodon_jax.pretrained import load_with_tokenizer
from megalodon_jax.train_state import init_state
from megalodon_jax.training.loop import train
from megalodon_jax.training.step import make_eval_step, make_train_step
from megalodon_jax.typing import Batch

LORA = LoraConfig(rank=2, alpha=4.0, targets=("layers.mega.*.kernel", "*.fc1.kernel"), dropout=0.1)
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 13), np.int32)


@pytest.fixture
def lora_run(trained_run, tmp_path) -> TrainConfig:
    """A run that adapts the tiny run."""
    return dataclasses.replace(
        trained_run, run_dir=str(tmp_path / "lora"), init_from=trained_run.run_dir, lora=LORA,
        optim=OptimConfig(lr=1e-2, warmup_steps=1, ema_decay=0.5), sample_tokens=0, z_loss=1e-3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapted_runs() -> dict[str, TrainConfig]:
    return {}


@pytest.fixture
def adapted(lora_run, adapted_runs, tmp_path_factory) -> TrainConfig:
    """The run after its last step; read only."""
    if not adapted_runs:
        run = dataclasses.replace(lora_run, run_dir=str(tmp_path_factory.mktemp("adapted") / "run"))
        train(run)
        adapted_runs["run"] = run
    return adapted_runs["run"]


def logits(model) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model: model(TOKENS).logits)(model))


@pytest.mark.slow
def test_checkpoints_hold_the_factors_and_the_record_of_the_base(adapted, trained_run):
    with RunCheckpoints(adapted.run_dir, read_only=True) as checkpoints:
        assert checkpoints.steps() == [3, 6]
        restored = checkpoints.restore(6, adapted)
    names = {"lora_a", "lora_b"}
    state = restored.state
    assert restored.base is not None
    assert restored.base.path == f"{trained_run.run_dir}/checkpoints/6"
    for tree in (state.params, state.average):
        assert {path[-1] for path, _ in nnx.to_flat_state(tree)} == names
        assert len(nnx.to_flat_state(tree)) == 2 * 6
    factors = len(jax.tree.leaves(state.params))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * factors
    assert {leaf.dtype for leaf in moments} == {np.dtype(np.float32)}
    of_params = Path(adapted.run_dir, "checkpoints", "6", "params")
    written = sum(path.stat().st_size for path in of_params.rglob("*") if path.is_file())
    base = Path(trained_run.run_dir, "checkpoints", "6", "params")
    assert written < sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
    with pytest.raises(MismatchError, match="LoRA factors without their base"):
        load_model(adapted.run_dir)


@pytest.mark.slow
def test_every_way_to_load_gives_the_merged_model(adapted, trained_run, tmp_path):
    model, tokenizer = megalodon_jax.load(adapted.run_dir)
    assert tokenizer is not None
    assert not has_lora(model)
    base = load_model(trained_run.run_dir).model
    same = {"wh1": False, "fc2": True}
    for name, linear in linear_kernels(model).items():
        if (layer := name.split(".")[2]) in same:
            equal = np.array_equal(linear.kernel[...], linear_kernels(base)[name].kernel[...])
            assert equal == same[layer]
    want = logits(model)
    assert np.abs(want - logits(base)).max() > 1e-3
    unmerged = megalodon_jax.load(adapted.run_dir, merge_lora=False).model
    assert has_lora(unmerged)
    np.testing.assert_allclose(logits(unmerged), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConvertError, match="merge_lora"):
        megalodon_jax.save(unmerged, tmp_path / "hf")
    named = load_with_tokenizer(adapted.run_dir)
    chex.assert_trees_all_equal(nnx.state(named.model), nnx.state(model))
    (answer,) = megalodon_jax.generate_text(model, tokenizer, ["ab"], SamplingParams(max_tokens=3))
    assert answer.text

    for target, to in (("merged", "run"), ("merged.safetensors", None), ("hf", "huggingface")):
        convert(adapted.run_dir, tmp_path / target, to=to, merge=True)
        found = megalodon_jax.load(tmp_path / target).model
        chex.assert_trees_all_equal(nnx.state(found), nnx.state(model))
    with pytest.raises(ConvertError, match="no LoRA factors to merge"):
        convert(trained_run.run_dir, tmp_path / "other", merge=True)


@pytest.mark.slow
def test_the_adapter_in_peft_files(adapted, trained_run, tmp_path):
    convert(adapted.run_dir, tmp_path / "adapter")
    table = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (table["peft_type"], table["r"], table["lora_alpha"]) == ("LORA", 2, 4.0)
    assert table["base_model_name_or_path"] == trained_run.run_dir
    arrays = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    # The sum of PEFT: W + (alpha / r) B A for weights (out, in), by the names of PyTorch.
    convert(trained_run.run_dir, tmp_path / "base.safetensors")
    convert(adapted.run_dir, tmp_path / "merged.safetensors", merge=True)
    base = load_file(tmp_path / "base.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    changed = 0
    for name, weight in base.items():
        want = weight.astype(np.float64)
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in arrays:
            a, b = arrays.pop(f"{prefix}.lora_A.weight"), arrays.pop(f"{prefix}.lora_B.weight")
            assert a.shape == (2, weight.shape[1])
            assert any(prefix.endswith(f".{target}") for target in table["target_modules"])
            want = want + 2.0 * b.astype(np.float64) @ a
            changed += 1
        np.testing.assert_allclose(merged[name], want, rtol=1e-6, atol=1e-7)
    assert changed == 6
    assert not arrays
    for target, to in (("x.safetensors", None), ("x", "run")):
        with pytest.raises(ConvertError, match="add --merge"):
            convert(adapted.run_dir, tmp_path / target, to=to)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(adapted, tmp_path, capsys):
    run = dataclasses.replace(adapted, run_dir=str(tmp_path / "run"), resume=True, resume_step=3)
    shutil.copytree(adapted.run_dir, run.run_dir)
    train(run)
    assert "parameters of LoRA beside" in capsys.readouterr().out
    states = []
    for each in (adapted, run):
        with RunCheckpoints(each.run_dir, read_only=True) as checkpoints:
            states.append(checkpoints.restore(6, each).state)
    chex.assert_trees_all_equal(*states)


@pytest.mark.slow
def test_another_base_or_other_factors_are_refused(adapted, trained_run, tmp_path):
    run = dataclasses.replace(adapted, run_dir=str(tmp_path / "run"), resume=True, steps=7)
    shutil.copytree(adapted.run_dir, run.run_dir)
    # Step 3 of the same run has other weights.
    other = f"{trained_run.run_dir}/checkpoints/3"
    with pytest.raises(MismatchError, match="these are other weights; restore the base"):
        train(dataclasses.replace(run, init_from=other))
    with pytest.raises(MismatchError, match="other weights"):
        megalodon_jax.load(run.run_dir, base=other)
    with pytest.raises(MismatchError, match=r"lora.alpha is 4.0 there, 5.0 now"):
        train(dataclasses.replace(run, lora=dataclasses.replace(LORA, alpha=5.0)))
    with pytest.raises(MismatchError, match=r"lora.rank is 2 there, 0 now"):
        train(dataclasses.replace(run, lora=LoraConfig()))
    second = {"run_dir": str(tmp_path / "second"), "init_from": run.run_dir, "resume": False}
    with pytest.raises(ConfigError, match="has LoRA factors itself"):
        train(dataclasses.replace(run, **second))
    with pytest.raises(ConfigError, match="init_from is empty"):
        dataclasses.replace(run, init_from="")
    # A copy of the base in another form is the same base; without a base there is an error.
    convert(trained_run.run_dir, tmp_path / "copy.safetensors")
    moved = megalodon_jax.load(run.run_dir, base=str(tmp_path / "copy.safetensors")).model
    want = megalodon_jax.load(run.run_dir).model
    chex.assert_trees_all_equal(nnx.state(moved), nnx.state(want))
    with pytest.raises(MismatchError, match=r"the base of the LoRA run .* cannot be read"):
        megalodon_jax.load(run.run_dir, base=str(tmp_path / "nothing"))
    copied = dataclasses.replace(run, init_from=str(tmp_path / "copy.safetensors"))
    assert train(copied).step == 7
    with RunCheckpoints(run.run_dir, read_only=True) as checkpoints:
        record = checkpoints.restore(7, copied).base
    assert record is not None
    assert record.path == copied.init_from


@pytest.mark.slow
def test_meshes_and_rematerialization_change_nothing(session_config):
    tokens = np.random.default_rng(0).integers(0, 250, (2, 4, 33), np.int32)
    segments = np.repeat([[1] * 9 + [2] * 23], 4, axis=0)[None].repeat(2, 0).astype(np.int32)
    batch = Batch(
        tokens[..., :-1], tokens[..., 1:], segments, np.ones(segments.shape, np.float32)
    )  # fmt: skip
    model = dataclasses.replace(session_config.model, num_heads=2, vocab_size=258, num_layers=2)
    results = []
    for mesh, changes in (
        (MeshConfig(), {}),
        (MeshConfig(data=2, model=2, chunk=2), {"remat": "block"}),
        (MeshConfig(data=4, model=2), {"scan_layers": False, "remat": "dots"}),
    ):
        run = dataclasses.replace(
            session_config, init_from="base", lora=dataclasses.replace(LORA, dropout=0.3),
            mesh=mesh, model=dataclasses.replace(model, **changes),
            data=dataclasses.replace(session_config.data, batch_size=4),
            optim=OptimConfig(lr=1e-2, warmup_steps=0, eps=1e-3, accumulate_steps=2, ema_decay=0.5),
        )  # fmt: skip
        graphdef, state = init_state(run)
        step = make_train_step(graphdef, run)
        evaluate = make_eval_step(graphdef, run)
        losses = []
        base = jax.device_get(state.base)
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))
        chex.assert_trees_all_equal(jax.device_get(state.base), base)
        first = jax.tree.map(lambda array: array[0], batch)
        heldout = float(evaluate(state.evaluated_params, first).loss_sum)
        merged = merge_lora(nnx.merge(graphdef, jax.device_get(state.evaluated_params)))
        results.append((losses, heldout, jax.device_get(state.params)))
        assert not has_lora(merged)
        assert losses == sorted(losses, reverse=True)
    for losses, heldout, params in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-5)
        assert heldout == pytest.approx(results[0][1], rel=1e-5)
        chex.assert_trees_all_close(params, results[0][2], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_factors_with_carried_states_resume_bit_for_bit(lora_run, tmp_path):
    """Documents that are longer than a row, whose state the checkpoint has beside the factors."""
    data = dataclasses.replace(lora_run.data, carry_state=True, seq_len=27)
    whole = dataclasses.replace(lora_run, data=data, steps=4, checkpoint_every=2)
    train(whole)
    again = shutil.copytree(whole.run_dir, tmp_path / "again")
    train(dataclasses.replace(whole, run_dir=str(again), resume=True, resume_step=2))
    states = []
    for run_dir in (whole.run_dir, again):
        with RunCheckpoints(run_dir, read_only=True) as checkpoints:
            states.append(checkpoints.restore(4, whole).state)
    assert states[0].carried is not None
    assert any(np.any(leaf) for leaf in jax.tree.leaves(states[0].carried))
    chex.assert_trees_all_equal(states[0].params, states[1].params)
    chex.assert_trees_all_equal(states[0].carried, states[1].carried)
