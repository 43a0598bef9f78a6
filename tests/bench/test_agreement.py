"""`bench agreement` compares the results of a mesh and of one device."""

import pytest

from megalodon_jax.bench import agreement
from megalodon_jax.cli.main import main

OPTIONS = ["--small", "--steps", "1", "--layers", "1", "--mesh", "fsdp", "model", "--documents"]


@pytest.mark.slow
def test_a_mesh_of_eight_devices_agrees_with_one(capsys, smaller_model):
    assert main(["bench", "agreement", *OPTIONS, "3"]) == 0
    text = capsys.readouterr().out
    assert "one device restores the checkpoint of fsdp bit for bit" in text
    # Two heads do not divide by eight devices: reported, and no disagreement.
    assert "model.num_heads 2 does not divide by mesh.model = 8" in text


def test_a_disagreement_is_an_exit_code(monkeypatch):
    single = agreement.GradientDistances(1e-2, 2e-2)
    worse = agreement.GradientDistances(1.3e-2, 2e-2)
    near = agreement.AgreementRow("fsdp", 0, single, single)
    far = agreement.AgreementRow("chunk", 0, worse, single)
    assert near.agrees
    assert not far.agrees
    for rows, is_same, code in ([near], True, 0), ([near, far], True, 1), ([near], False, 1):
        monkeypatch.setattr(agreement, "compare", lambda _, found=(rows, is_same): found)
        assert main(["bench", "agreement"]) == code
