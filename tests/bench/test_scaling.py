"""`bench scaling` compares a mesh with one device."""

import json

import pytest

from megalodon_jax.bench.options import BenchScalingOptions
from megalodon_jax.bench.scaling import scaling_cases
from megalodon_jax.cli.main import main
from megalodon_jax.errors import ConfigError


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


def test_pairs_of_devices_along_a_second_axis():
    options = BenchScalingOptions(
        rows=2,
        length=16_384,
        mesh=("fsdp+chunk", "fsdp+model", "chunk"),
        scaling=("weak", "strong"),
        reduce_dtype="bfloat16",
    )
    one, *others = scaling_cases(options, 4)
    assert (one[0].rows, one[0].length, one[0].devices) == (2, 16_384, 1)
    sizes = [(config.mesh.data, config.mesh.chunk, config.mesh.model) for _, config in others]
    assert sizes == [(2, 2, 1)] * 2 + [(2, 1, 2)] * 2 + [(1, 4, 1)] * 2
    work = [(row.rows, row.length) for row, _ in others]
    # Weak scaling keeps the tokens of a device.
    assert work[::2] == [(4, 32_768), (8, 16_384), (2, 65_536)]
    assert work[1::2] == [(2, 16_384)] * 3
    assert all(config.model.reduce_dtype == "bfloat16" for _, config in others)
    with pytest.raises(ConfigError, match=r"fsdp\+chunk needs an even number of devices"):
        list(scaling_cases(options, 3))
