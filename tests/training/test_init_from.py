"""Runs that start from trained weights of any form, also with longer chunks or slower rotations."""

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
from megalodon_jax.config import MeshConfig, OptimConfig
from megalodon_jax.errors import ConvertError, MismatchError
from megalodon_jax.interop.convert import convert
from megalodon_jax.interop.initial_weights import read_initial_weights
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.parallel.sharding import shardings_of
from megalodon_jax.training.loop import train

# Too small to move a weight.
STILL = OptimConfig(lr=1e-30, warmup_steps=0, weight_decay=0.0)


@pytest.mark.slow
def test_longer_chunks_and_another_rotation(trained_run, tmp_path, capsys):
    model = dataclasses.replace(trained_run.model, chunk_size=32, rope_base=5e5)
    run = dataclasses.replace(
        trained_run, run_dir=str(tmp_path / "long"), init_from=trained_run.run_dir, model=model,
        optim=STILL, steps=1, sample_tokens=0,
    )  # fmt: skip
    train(run)
    out = capsys.readouterr().out
    assert "model.chunk_size was 16 and is 32 from step 1 on" in out
    lines = Path(run.run_dir, "metrics.jsonl").read_text().splitlines()
    logged = [
        line["changed_settings"] for line in map(json.loads, lines) if "changed_settings" in line
    ]
    assert logged == [{"model.chunk_size": [16, 32], "model.rope_base": [10_000.0, 5e5]}]
    found, config = load_model(run.run_dir)
    assert config.model == model
    before = load_model(trained_run.run_dir).model
    chex.assert_trees_all_equal(nnx.state(found), nnx.state(before))
    # The model sees longer chunks: only tokens after the first 16 have other scores.
    tokens = np.random.default_rng(0).integers(0, 250, (1, 27), np.int32)
    same_rotation = dataclasses.replace(model, rope_base=10_000.0)
    graphdef = nnx.split(megalodon_jax.Megalodon(same_rotation, rngs=nnx.Rngs(0)))[0]
    longer = nnx.merge(graphdef, nnx.state(found))(tokens).logits
    want = before(tokens).logits
    np.testing.assert_allclose(longer[:, :16], want[:, :16], rtol=1e-5, atol=1e-5)
    assert np.abs(longer[:, 16:] - want[:, 16:]).max() > 1e-4
    other = dataclasses.replace(model, ffn_hidden_dim=12, norm_eps=1e-4)
    refused = dataclasses.replace(run, run_dir=str(tmp_path / "other"), model=other)
    with pytest.raises(MismatchError, match=r"ffn_hidden_dim is 8 in .* 12 now; norm_eps") as error:
        train(refused)
    assert "chunk_size" not in str(error.value)


@pytest.mark.slow
def test_every_form_gives_the_same_weights(trained_run, tmp_path):
    convert(trained_run.run_dir, tmp_path / "file.safetensors")
    convert(trained_run.run_dir, tmp_path / "hf")
    mesh = make_mesh(MeshConfig(data=-1))
    at = f"{trained_run.run_dir}/checkpoints/6"
    want = read_initial_weights(trained_run.run_dir, trained_run, mesh)
    assert want.path == at
    assert want.changes == {}
    records = {want.record().fingerprint}
    for source in (at, tmp_path / "file.safetensors", tmp_path / "hf"):
        found = read_initial_weights(source, trained_run, mesh)
        chex.assert_trees_all_equal(found.params, want.params)
        shardings = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding, found.params))
        assert shardings == jax.tree.leaves(shardings_of(found.params, mesh))
        records.add(found.record().fingerprint)
    records.add(read_initial_weights(at, trained_run, None).record().fingerprint)
    assert len(records) == 1
    earlier = read_initial_weights(f"{trained_run.run_dir}/checkpoints/3", trained_run, None)
    assert earlier.record().fingerprint not in records
    with pytest.raises(ConvertError, match="does not exist"):
        read_initial_weights(tmp_path / "nothing", trained_run, mesh)
