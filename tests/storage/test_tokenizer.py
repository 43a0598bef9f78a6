"""A run keeps its tokenizer: a copy of the run works without the original file."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from flax import nnx

from megalodon_jax.checkpoints import (
    RunCheckpoints,
    load_model,
    load_run_tokenizer,
    load_trained,
    save_model,
)
from megalodon_jax.cli.main import main
from megalodon_jax.config import TrainConfig
from megalodon_jax.data import load_tokenizer
from megalodon_jax.errors import DataError, MismatchError
from megalodon_jax.models import abstract_model
from megalodon_jax.train_state import init_state
from tests.data.tokenizer_files import save_json_tokenizer, save_sentencepiece

BOTH = pytest.mark.parametrize("original", ["tokenizers", "sentencepiece"], indirect=True)


@pytest.fixture
def original(request, tmp_path) -> Path:
    """A tokenizer file with a name of its own; that of `tokenizers` has a configuration."""
    folder = tmp_path / "original"
    folder.mkdir()
    if getattr(request, "param", "") == "sentencepiece":
        return save_sentencepiece(folder / "words.model")
    # The order of the boundary tokens is known from this file only.
    config = {"bos_token": "<b>", "eos_token": "<a>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return save_json_tokenizer(folder / "words.json", ["<a>", "<b>"])


@pytest.fixture
def with_tokenizer(config, original) -> TrainConfig:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=400),
        data=dataclasses.replace(config.data, tokenizer=str(original)),
    )


def save(config: TrainConfig) -> None:
    graphdef, _ = abstract_model(config.model)
    save_model(nnx.merge(graphdef, init_state(config)[1].params), config.run_dir, config)


@BOTH
@pytest.mark.slow
def test_a_moved_run_needs_no_original(with_tokenizer, original, tmp_path):
    expected = load_tokenizer(str(original)).fingerprint()
    save(with_tokenizer)
    stored = sorted(path.name for path in Path(with_tokenizer.run_dir, "tokenizer").iterdir())
    assert stored in (["tokenizer.json", "tokenizer_config.json"], ["tokenizer.model"])
    shutil.rmtree(original.parent)
    shutil.move(with_tokenizer.run_dir, tmp_path / "moved")
    moved = tmp_path / "moved"
    assert load_trained(moved).tokenizer.fingerprint() == expected
    # `convert` gives the tokenizer on.
    assert load_model(moved).config.data.tokenizer == str(moved / "tokenizer" / stored[0])
    assert main(["convert", str(moved), str(tmp_path / "again"), "--to", "run"]) == 0
    shutil.rmtree(moved)
    assert load_trained(tmp_path / "again").tokenizer.fingerprint() == expected


@BOTH
@pytest.mark.slow
def test_a_changed_original_does_not_matter_but_a_changed_copy_does(with_tokenizer, original):
    content = original.read_bytes()
    save(with_tokenizer)
    original.write_bytes(b"changed")
    load_trained(with_tokenizer.run_dir)
    # A run of an older version, or of which only the checkpoints were copied, has no copy.
    copy = next(Path(with_tokenizer.run_dir, "tokenizer").glob("tokenizer.*"))
    other = original.with_name(f"other{original.suffix}")
    if original.suffix == ".json":
        save_json_tokenizer(other, ["<a>", "<b>"], "metaspace")
    else:
        save_sentencepiece(other, normalization_rule_name="identity")
    copy.write_bytes(other.read_bytes())
    with pytest.raises(MismatchError, match=r"was trained with tokenizer .* is now .*--tokenizer"):
        load_trained(with_tokenizer.run_dir)
    shutil.rmtree(copy.parent)
    original.write_bytes(content)
    load_trained(with_tokenizer.run_dir)


@pytest.mark.slow
def test_an_option_overrides_the_copy(with_tokenizer, original, tmp_path, capsys):
    save(with_tokenizer)
    arguments = ["generate", with_tokenizer.run_dir, "", "--max_tokens", "2"]
    assert main([*arguments, "--tokenizer", str(original)]) == 0
    assert "warning" not in capsys.readouterr().err
    other = save_json_tokenizer(tmp_path / "other.json", ["<s>", "</s>"], "metaspace")
    assert main([*arguments, "--tokenizer", str(other)]) == 0
    assert f"warning: tokenizer '{other}' is tokenizers:" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("hello world")
    evaluate = ["evaluate", "--checkpoint", with_tokenizer.run_dir, "--files", str(text)]
    assert main([*evaluate, "--tokenizer", str(original)]) == 0
    assert main([*evaluate, "--tokenizer", str(tmp_path / "none.json")]) == 1


@pytest.mark.slow
def test_an_override_with_more_ids_than_the_model_is_refused(config, tmp_path):
    save(config)
    other = save_json_tokenizer(tmp_path / "other.json", ["<s>", "</s>"])
    with pytest.raises(MismatchError, match=r"has 3\d\d ids, the model in .* 257"):
        load_trained(config.run_dir, tokenizer=str(other))


def test_a_resumed_run_has_its_own_copy(with_tokenizer, original, capsys):
    expected = load_run_tokenizer(with_tokenizer).fingerprint()
    with RunCheckpoints(with_tokenizer.run_dir) as checkpoints:
        checkpoints.keep_tokenizer(load_tokenizer(str(original)))
    resumed = dataclasses.replace(with_tokenizer, resume=True)
    original.unlink()
    assert load_run_tokenizer(resumed).fingerprint() == expected
    assert f"{original} does not exist; using " in capsys.readouterr().err
    with pytest.raises(DataError, match="cannot read tokenizer"):
        load_run_tokenizer(with_tokenizer)
    shutil.rmtree(Path(with_tokenizer.run_dir, "tokenizer"))
    with pytest.raises(DataError, match=r"does not exist, and .* has no copy of it"):
        load_run_tokenizer(resumed)


@pytest.mark.slow
def test_a_checkpoint_names_no_file_outside_its_run(with_tokenizer, monkeypatch, tmp_path):
    from megalodon_jax.checkpoints import manager

    monkeypatch.setattr(manager, "relative_path", lambda _: f"../{tmp_path.name}/x.json")
    save(with_tokenizer)
    assert load_model(with_tokenizer.run_dir).config == with_tokenizer
