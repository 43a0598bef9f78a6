"""`bench agreement` compares what a mesh and one device compute."""

import pytest

from megalodon_jax.bench import agreement
from megalodon_jax.cli.main import main

OPTIONS = ["--small", "--steps", "1", "--layers", "1", "--mesh", "fsdp", "model", "--documents"]


@pytest.mark.slow
def test_a_mesh_of_eight_devices_agrees_with_one(capsys):
    assert main(["bench", "agreement", *OPTIONS, "3"]) == 0
    text = capsys.readouterr().out
    assert "one device restores bit for bit" in text
    # Two heads are not shared by eight devices; that is said, and is no disagreement.
    assert "model.num_heads 2 does not divide by mesh.model = 8" in text


def test_what_is_too_far_is_said(monkeypatch, capsys):
    alone, worse = agreement.Distances(1e-2, 2e-2), agreement.Distances(1.3e-2, 2e-2)
    near = agreement.AgreementRow("fsdp", 0, alone, alone)
    far = agreement.AgreementRow("chunk", 0, worse, alone)
    assert near.agrees
    assert not far.agrees
    for rows, is_same, code in ([near], True, 0), ([near, far], True, 1), ([near], False, 1):
        monkeypatch.setattr(agreement, "run", lambda _, found=(rows, is_same): found)
        assert main(["bench", "agreement"]) == code
