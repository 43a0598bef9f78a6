"""Load and save: every form, one checkpoint of a run, dtype, mesh, no warnings, errors."""

import logging
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import megalodon_jax
from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.checkpoints import load_model, save_model
from megalodon_jax.config import MeshConfig, TrainConfig, TransformerConfig
from megalodon_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from megalodon_jax.data.train_tokenizer import train_tokenizer
from megalodon_jax.errors import CheckpointError, ConfigError, ConvertError, MegalodonError
from megalodon_jax.interop.convert import convert
from megalodon_jax.parallel.mesh import make_mesh

TOKENS = np.arange(40, dtype=np.int32)[None] % 257


def params_of(model):
    return nnx.to_flat_state(nnx.state(model, nnx.Param))


def assert_same_parameters(found, expected):
    found, expected = dict(params_of(found)), dict(params_of(expected))
    assert found.keys() == expected.keys()
    for path, param in expected.items():
        np.testing.assert_array_equal(found[path][...], param[...], err_msg=str(path))


def test_every_form_gives_the_same_model_and_tokenizer(trained_run, tmp_path):
    run = Path(trained_run.run_dir)
    expected = load_model(run).model
    convert(run, tmp_path / "a.safetensors")
    convert(run, tmp_path / "hf")
    first = megalodon_jax.load(run)
    megalodon_jax.save(first.model, tmp_path / "b.safetensors", tokenizer=first.tokenizer)
    megalodon_jax.save(first.model, tmp_path / "hf2", tokenizer=first.tokenizer, config=trained_run)
    names = ("a.safetensors", "b.safetensors", "hf", "hf2")
    for source in (run, run / "checkpoints" / "6", *(tmp_path / name for name in names)):
        model, tokenizer = megalodon_jax.load(str(source))
        assert_same_parameters(model, expected)
        assert isinstance(tokenizer, ByteTokenizer)
        assert all(isinstance(p[...], jax.Array) for _, p in params_of(model))
    logits = np.asarray(expected(TOKENS).logits)
    np.testing.assert_array_equal(megalodon_jax.load(tmp_path / "hf2").model(TOKENS).logits, logits)


def test_one_checkpoint_of_a_run(trained_run):
    checkpoint = Path(trained_run.run_dir, "checkpoints", "3")
    model = megalodon_jax.load(checkpoint).model
    assert_same_parameters(model, load_model(trained_run.run_dir, step=3).model)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are: 3, 6"):
        megalodon_jax.load(checkpoint.with_name("5"))


def test_dtype_is_that_of_the_computation(trained_run):
    exact = megalodon_jax.load(trained_run.run_dir).model
    model = megalodon_jax.load(trained_run.run_dir, dtype="bfloat16").model
    assert model.config.dtype == "bfloat16"
    assert_same_parameters(model, exact)
    assert model.hidden(TOKENS).hidden.dtype == "bfloat16"
    difference = np.abs(np.asarray(model(TOKENS).logits) - np.asarray(exact(TOKENS).logits)).max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize("form", ["run", "hf"])
@pytest.mark.slow
def test_a_mesh_shards_the_parameters(trained_run, tmp_path, form):
    source = Path(trained_run.run_dir)
    if form == "hf":
        convert(source, tmp_path / "hf")
        source = tmp_path / "hf"
    wide = make_mesh(MeshConfig(data=1, model=8), jax.devices())
    with pytest.raises(ConfigError, match=r"does not divide over mesh .*model 8"):
        megalodon_jax.load(source, mesh=wide)
    mesh = make_mesh(MeshConfig(data=4, model=1), jax.devices()[:4])
    model = megalodon_jax.load(source, mesh=mesh).model
    kernel = model.layers.nffn.fc1.kernel[...]
    assert kernel.sharding.mesh.shape == mesh.shape
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    expected = megalodon_jax.load(source).model
    assert_same_parameters(model, expected)
    with jax.set_mesh(mesh):
        logits = model(np.repeat(TOKENS, 4, axis=0)).logits
    np.testing.assert_allclose(logits[:1], expected(TOKENS).logits, rtol=2e-5, atol=2e-5)


def test_loading_gives_no_warnings(trained_run, tmp_path, caplog, capfd):
    convert(trained_run.run_dir, tmp_path / "hf")
    capfd.readouterr()
    # The command line raises the level of this logger.
    logging.getLogger("absl").setLevel(logging.NOTSET)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        megalodon_jax.load(trained_run.run_dir)
        megalodon_jax.load(tmp_path / "hf")
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_file_goes_along(trained_run, text_file, tmp_path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer(
        (str(text_file),), str(path), vocab_size=280, document_separator="\0", library="tokenizers"
    )
    tokenizer = load_tokenizer(str(path))
    model = megalodon_jax.load(trained_run.run_dir).model
    megalodon_jax.save(model, tmp_path / "hf", tokenizer=tokenizer)
    found = megalodon_jax.load(tmp_path / "hf").tokenizer
    assert found is not None
    assert found.encode("ab c <s>").tolist() == tokenizer.encode("ab c <s>").tolist()
    with pytest.raises(ConvertError, match="cannot keep a tokenizer's files; give a folder"):
        megalodon_jax.save(model, tmp_path / "a.safetensors", tokenizer=tokenizer)
    megalodon_jax.save(model, tmp_path / "a.safetensors")
    assert megalodon_jax.load(tmp_path / "a.safetensors").tokenizer is None
    named = megalodon_jax.load(tmp_path / "a.safetensors", tokenizer=str(path)).tokenizer
    assert named is not None
    assert named.fingerprint() == tokenizer.fingerprint()


def test_a_transformer_loads_from_its_run_and_is_not_saved_otherwise(tmp_path):
    config = TransformerConfig(num_layers=1, model_dim=8, num_heads=1, vocab_size=257)
    model = Transformer(config, rngs=nnx.Rngs(0))
    save_model(model, tmp_path / "run", TrainConfig(model=config))
    loaded = megalodon_jax.load(tmp_path / "run")
    assert isinstance(loaded.model, Transformer)
    assert_same_parameters(loaded.model, model)
    for name in ("hf", "a.safetensors"):
        with pytest.raises(ConvertError, match=r"'transformer'.*use the run directory itself"):
            megalodon_jax.save(model, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_errors_say_what_came_in(trained_run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10" * 40)
    shutil.copytree(trained_run.run_dir, tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "checkpoints").rglob("d/*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    cases = {
        "absent": "absent does not exist",
        "empty": "empty holds nothing: it is no run_dir",
        "foreign": '"config.json", "model.safetensors".*no config.json of model type megalodon',
        "notes.txt": "cannot read .*notes.txt as a model; give a run_dir",
        "bad.safetensors": "cannot read .*bad.safetensors as safetensors",
        "damaged": "no checkpoint in .*damaged.* can be read",
    }
    for name, message in cases.items():
        with pytest.raises(MegalodonError, match=message):
            megalodon_jax.load(tmp_path / name)
    model = megalodon_jax.load(trained_run.run_dir).model
    with pytest.raises(ConvertError, match="empty exists and is not overwritten"):
        megalodon_jax.save(model, tmp_path / "empty")
    with pytest.raises(ConvertError, match=r"config\.model and model\.config differ"):
        megalodon_jax.save(model, tmp_path / "new", config=TrainConfig())
    with pytest.raises(ConvertError, match="object store"):
        megalodon_jax.save(model, "gs://bucket/model")
