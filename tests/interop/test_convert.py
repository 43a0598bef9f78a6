"""Conversion between released checkpoints, safetensors files and run directories; errors."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megalodon_jax.checkpoints import load_model
from megalodon_jax.cli.main import main
from megalodon_jax.config import ModelConfig
from megalodon_jax.errors import ConvertError
from megalodon_jax.interop.convert import convert
from megalodon_jax.interop.released import to_state_dict
from tests.golden_files import golden_model
from tests.torch_files import write_torch_file


@pytest.fixture(scope="module")
def released_dir(tmp_path_factory):
    golden = golden_model("model_a_plain")
    directory = tmp_path_factory.mktemp("released")
    (directory / "config.json").write_text(json.dumps({"model": golden.meta["config"]}))
    write_torch_file(directory / "consolidated.pth", golden.state_dict)
    return directory


def test_released_to_safetensors_to_run_and_back(released_dir, tmp_path):
    golden = golden_model("model_a_plain")
    assert main(["convert", str(released_dir), str(tmp_path / "mega.safetensors")]) == 0
    for key, value in load_file(tmp_path / "mega.safetensors").items():
        np.testing.assert_array_equal(value, golden.state_dict[key], err_msg=key)

    convert(tmp_path / "mega.safetensors", tmp_path / "run")
    model, config = load_model(tmp_path / "run")
    assert config.model == golden.build().config
    for key, value in to_state_dict(model).items():
        np.testing.assert_array_equal(value, golden.state_dict[key], err_msg=key)

    convert(tmp_path / "run", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == golden.state_dict.keys()


def test_a_source_without_configuration_needs_one(tmp_path):
    golden = golden_model("model_a_plain")
    save_file(golden.state_dict, tmp_path / "bare.safetensors")
    with pytest.raises(
        ConvertError, match=r"bare\.safetensors has no model configuration.*--config"
    ):
        convert(tmp_path / "bare.safetensors", tmp_path / "run")
    shape = golden.meta["config"]
    lines = [
        f"{name} = {shape[name]}"
        for name in ("num_layers", "model_dim", "z_dim", "value_dim", "num_heads", "chunk_size")
    ]
    others = "ffn_hidden_dim = 160\nvocab_size = 97\nnorm_num_groups = 8\n"
    (tmp_path / "shape.toml").write_text("[model]\n" + "\n".join(lines) + "\n" + others)
    convert(tmp_path / "bare.safetensors", tmp_path / "run", str(tmp_path / "shape.toml"))
    assert isinstance(load_model(tmp_path / "run").config.model, ModelConfig)


def test_errors(released_dir, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    cases = [
        (released_dir, tmp_path / "there", "there exists and is not overwritten"),
        (tmp_path / "absent", tmp_path / "out", "absent does not exist"),
        (tmp_path / "there", tmp_path / "out", "not a consolidated released checkpoint"),
        (released_dir, tmp_path / "out.bin", r"a name that ends in \.safetensors"),
    ]
    for source, target, message in cases:
        with pytest.raises(ValueError, match=message):
            convert(source, target)
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "out")]) == 1
    assert "absent does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
