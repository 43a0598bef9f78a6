"""The Hugging Face form without torch: files, index, configuration, tokenizer, card, way back."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as RustTokenizer

from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.checkpoints import load_model
from megalodon_jax.cli.main import main
from megalodon_jax.config import ModelConfig, TrainConfig, TransformerConfig
from megalodon_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from megalodon_jax.data.train_tokenizer import train_tokenizer
from megalodon_jax.errors import ConvertError, StateDictError
from megalodon_jax.interop.convert import convert, read_safetensors
from megalodon_jax.interop.huggingface import read_huggingface, write_huggingface
from megalodon_jax.interop.huggingface.tokenizer_files import byte_tokenizer_json
from megalodon_jax.interop.released import to_state_dict
from megalodon_jax.model import Megalodon
from tests.ablations import VARIANTS
from tests.golden_files import golden_model
from tests.torch_files import write_torch_file

TEXTS = ("def f():\n    return 1", "\u00e4\u6f22\U0001f600 <|endoftext|> \x00\x7f", "", "  a  b ")


@pytest.fixture(scope="module")
def golden():
    return golden_model("model_b_all_on")


@pytest.fixture(scope="module")
def model(golden) -> Megalodon:
    return golden.build()


def assert_same_weights(found: Megalodon, expected: Megalodon) -> None:
    found_arrays, arrays = to_state_dict(found), to_state_dict(expected)
    assert found_arrays.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(found_arrays[name], value, err_msg=name)
        assert found_arrays[name].dtype == value.dtype, name


def test_a_run_and_back(trained_run, tmp_path, capsys):
    folder = tmp_path / "hf"
    assert main(["convert", trained_run.run_dir, str(folder)]) == 0
    assert f"wrote {folder}: " in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "configuration_megalodon.py", "generation_config.json",
        "model.safetensors", "modeling_megalodon.py", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert main(["convert", str(folder), str(tmp_path / "back.safetensors")]) == 0
    expected, config = load_model(trained_run.run_dir)
    found, saved = read_safetensors(tmp_path / "back.safetensors")
    assert saved == config
    assert_same_weights(found, expected)
    assert main(["convert", str(folder), str(tmp_path / "run")]) == 0
    assert load_model(tmp_path / "run").config.data == config.data


def test_the_card_has_the_metrics_of_the_run_and_no_other(trained_run, finished, tmp_path):
    convert(trained_run.run_dir, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    lines = [
        json.loads(line)
        for line in Path(trained_run.run_dir, "metrics.jsonl").read_text().splitlines()
    ]
    heldout = next(line for line in reversed(lines) if "heldout_loss" in line)
    tokens = sum(line["tokens"] for line in lines if "tokens" in line)
    assert f"| held-out loss, nats per token | {heldout['heldout_loss']:.4f} (after" in card
    assert f"| held-out bits per byte | {heldout['heldout_bits_per_byte']:.4f} (after" in card
    assert f"| tokens with a loss | {tokens:,.0f} |" in card
    # An earlier checkpoint has none of what was measured after it.
    convert(Path(trained_run.run_dir, "checkpoints", "3"), tmp_path / "hf3")
    early = (tmp_path / "hf3" / "README.md").read_text()
    assert "| updates | 3 |" in early
    assert "held-out" not in early
    Path(finished.run_dir, "metrics.jsonl").unlink()
    convert(finished.run_dir, tmp_path / "bare")
    bare = (tmp_path / "bare" / "README.md").read_text()
    assert "| updates | 6 |" in bare
    assert "held-out" not in bare
    assert "tokens with a loss" not in bare


def test_shards_have_an_index_and_a_limited_size(model, tmp_path):
    folder = tmp_path / "hf"
    write_huggingface(model, folder, max_shard_bytes=100_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    arrays = {name: load_file(folder / name) for name in files}
    assert index["metadata"]["total_size"] == sum(
        array.nbytes for shard in arrays.values() for array in shard.values()
    )
    for name, shard in arrays.items():
        assert sum(array.nbytes for array in shard.values()) <= 100_000 or len(shard) == 1
        assert all(index["weight_map"][entry] == name for entry in shard)
    # Derived entries are computed by the PyTorch model, and by the way back.
    assert not {"rope.freqs", "output.output.weight"} & index["weight_map"].keys()
    assert_same_weights(read_huggingface(folder).model, model)
    (folder / files[1]).unlink()
    with pytest.raises(ConvertError, match=files[1]):
        read_huggingface(folder)


def test_config_has_the_sizes_and_the_code(model, golden, tmp_path):
    write_huggingface(model, tmp_path / "hf", tokenizer=ByteTokenizer())
    table = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert table["model_type"] == "megalodon"
    assert table["torch_dtype"] == "float32"
    assert table["tie_word_embeddings"] is True
    for file, name in (part.split(".") for part in table["auto_map"].values()):
        assert f"class {name}(" in (tmp_path / "hf" / f"{file}.py").read_text()
    for name in ("num_layers", "z_dim", "chunk_size", "rope_base", "swiglu", "norm_num_groups"):
        assert table[name] == getattr(model.config, name)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (256, 256)


def test_released_checkpoint_to_this_form(golden, model, tmp_path):
    released = tmp_path / "released"
    released.mkdir()
    (released / "config.json").write_text(json.dumps({"model": golden.meta["config"]}))
    write_torch_file(released / "consolidated.pth", golden.state_dict)
    convert(released, tmp_path / "hf", to="huggingface")
    contents = read_huggingface(tmp_path / "hf")
    assert contents.tokenizer is None
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert_same_weights(contents.model, model)
    convert(released, tmp_path / "hf2", to="huggingface", tokenizer="bytes")
    assert read_huggingface(tmp_path / "hf2").tokenizer == "bytes"


@pytest.mark.slow
def test_bfloat16_is_exact(tmp_path):
    config = ModelConfig(
        num_layers=2, model_dim=16, z_dim=8, value_dim=16, ffn_hidden_dim=24, cema_ndim=4,
        chunk_size=8, vocab_size=11, norm_num_groups=4, norm_prior_count=3, param_dtype="bfloat16",
    )  # fmt: skip
    model = Megalodon(config, rngs=nnx.Rngs(0))
    write_huggingface(model, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    arrays = load_file(tmp_path / "hf" / "model.safetensors")
    assert arrays["embed.weight"].dtype == ml_dtypes.bfloat16
    assert arrays["layers.0.mega.cema.alpha"].dtype == np.float32
    assert_same_weights(read_huggingface(tmp_path / "hf").model, model)


def test_byte_tokenizer_json_gives_our_ids():
    tokenizer, ours = RustTokenizer.from_str(byte_tokenizer_json()), ByteTokenizer()
    tokenizer.encode_special_tokens = True
    assert tokenizer.get_vocab_size() == ours.vocab_size
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.encode(text).ids == [ours.bos_id, *ids]
        assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("<|endoftext|>") == ours.eos_id


@pytest.mark.parametrize("library", ["tokenizers", "sentencepiece"])
def test_tokenizer_files_and_back(model, library, text_file, tmp_path):
    suffix = "json" if library == "tokenizers" else "model"
    path = tmp_path / f"tokenizer.{suffix}"
    train_tokenizer(
        (str(text_file),), str(path), vocab_size=280, document_separator="\0", library=library
    )
    tokenizer = load_tokenizer(str(path))
    write_huggingface(model, tmp_path / "hf", tokenizer=tokenizer)
    name = read_huggingface(tmp_path / "hf").tokenizer
    assert name == str(tmp_path / "hf" / path.name)
    again = load_tokenizer(name)
    for text in TEXTS:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    # The second folder has the same files, byte for byte.
    write_huggingface(model, tmp_path / "hf2", tokenizer=again)
    for file in (path.name, "tokenizer_config.json"):
        assert (tmp_path / "hf2" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    if library == "tokenizers":
        plain = RustTokenizer.from_file(str(tmp_path / "hf" / path.name))
        plain.encode_special_tokens = True
        ids = tokenizer.encode(TEXTS[0]).tolist()
        assert plain.encode(TEXTS[0]).ids == [tokenizer.bos_id, *ids]
    else:
        assert again.fingerprint() == tokenizer.fingerprint()
    has_code = (tmp_path / "hf" / "tokenization_megalodon.py").exists()
    assert has_code == (library == "sentencepiece")


@pytest.mark.parametrize("name", VARIANTS)
def test_ablations_are_refused_by_name(name, tmp_path):
    config = ModelConfig(
        num_layers=1, model_dim=8, z_dim=4, value_dim=8, ffn_hidden_dim=8, cema_ndim=2,
        chunk_size=16, vocab_size=257, norm_num_groups=2, **VARIANTS[name],
    )  # fmt: skip
    model = nnx.eval_shape(lambda: Megalodon(config, rngs=nnx.Rngs(0)))
    with pytest.raises(StateDictError, match=next(iter(VARIANTS[name]))):
        write_huggingface(model, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(model, tmp_path):
    config = TransformerConfig(num_layers=1, model_dim=8, num_heads=1, vocab_size=11)
    transformer = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ConvertError, match="'transformer'"):
        write_huggingface(transformer, tmp_path / "hf")
    with pytest.raises(ConvertError, match="max_shard_bytes is 0"):
        write_huggingface(model, tmp_path / "hf", max_shard_bytes=0)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConvertError, match="there exists and is not overwritten"):
        write_huggingface(model, tmp_path / "there")
    with pytest.raises(ConvertError, match="is the name of a file"):
        convert(tmp_path / "there", tmp_path / "a.safetensors", to="huggingface")


def test_an_interrupted_write_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("megalodon_jax.interop.huggingface.folder.model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        write_huggingface(model, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_folders(model, tmp_path):
    folder = tmp_path / "hf"
    write_huggingface(model, folder, max_shard_bytes=100_000)
    config = folder / "config.json"
    table = json.loads(config.read_text())
    config.write_text(json.dumps({**table, "chunk_size": 7}))
    with pytest.raises(ConvertError, match="chunk_size is 7 and"):
        read_huggingface(folder)
    config.write_text(json.dumps({**table, "model_type": "llama"}))
    with pytest.raises(ConvertError, match="model of type 'llama'"):
        read_huggingface(folder)
    config.write_text("{")
    with pytest.raises(ConvertError, match="as JSON"):
        read_huggingface(folder)
    config.write_text(json.dumps(table))
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for file in ("../elsewhere.safetensors", "model.bin"):
        index.write_text(json.dumps({"weight_map": {"embed.weight": file}}))
        with pytest.raises(ConvertError, match="must be one of the folder"):
            read_huggingface(folder)
    del whole["weight_map"]["embed.weight"]
    index.write_text(json.dumps(whole))
    with pytest.raises(ConvertError, match=r"differ in 1 entries.*embed\.weight"):
        read_huggingface(folder)


def test_a_folder_that_transformers_saved_has_no_metadata(model, tmp_path):
    folder = tmp_path / "hf"
    write_huggingface(model, folder)
    arrays = load_file(folder / "model.safetensors")
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    table = json.loads((folder / "config.json").read_text())
    table["dtype"] = table.pop("torch_dtype")
    (folder / "config.json").write_text(json.dumps(table))
    contents = read_huggingface(folder)
    assert contents.config == TrainConfig(model=contents.model.config)
    assert dataclasses.replace(model.config) == contents.model.config
    assert_same_weights(contents.model, model)
