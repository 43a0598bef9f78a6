"""`bench scaling` compares a mesh with one device."""

import json

import pytest

from megalodon_jax.cli.main import main


@pytest.mark.slow
def test_two_meshes_of_eight_devices(tmp_path, capsys, smaller_model):
    file = tmp_path / "scaling.json"
    options = ["--small", "--steps", "1", "--mesh", "fsdp", "model", "--scaling", "weak"]
    assert main(["bench", "scaling", *options, "--json", str(file)]) == 0
    one, fsdp, model = json.loads(file.read_text())["rows"]
    assert (one["devices"], one["efficiency"]) == (1, 1.0)
    assert (fsdp["rows"], fsdp["length"]) == (16, 128)
    ratio = fsdp["tokens_per_second"] / one["tokens_per_second"]
    assert fsdp["efficiency"] == pytest.approx(ratio / 8)
    assert fsdp["peak_bytes"] > 0
    # Two heads do not divide by eight devices: reported, and the table continues.
    assert model["tokens_per_second"] is None
    text = capsys.readouterr().out
    assert "model.num_heads 2 does not divide by mesh.model = 8" in text
