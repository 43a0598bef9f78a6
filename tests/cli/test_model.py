"""Commands that take a model: runs, checkpoints, .safetensors files, Hugging Face folders."""

from pathlib import Path

import pytest

from megalodon_jax.cli.main import main
from megalodon_jax.interop.convert import convert

EVALUATE = ("--piece_length", "64", "--batch_size", "2")


@pytest.mark.slow
def test_evaluate_takes_every_form_of_a_model(trained_run, tmp_path, capsys):
    run = Path(trained_run.run_dir)
    convert(run, tmp_path / "a.safetensors")
    convert(run, tmp_path / "hf")
    (tmp_path / "a.txt").write_text("one document of text")
    shown = []
    checkpoint = run / "checkpoints" / "6"
    for source in (run, checkpoint, tmp_path / "a.safetensors", tmp_path / "hf"):
        command = ["evaluate", "--checkpoint", str(source), "--files", str(tmp_path / "a.txt")]
        assert main([*command, *EVALUATE]) == 0
        shown.append(capsys.readouterr().out)
    assert "bits per byte" in shown[0]
    assert shown == [shown[0]] * 4
    assert main(["generate", str(tmp_path / "hf"), "a", "--step", "3", "--max_tokens", "1"]) == 2
    assert "step 3 names a checkpoint of a run" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "a", "--max_tokens", "1"]) == 1
    assert "it is no run_dir (no folder checkpoints)" in capsys.readouterr().err
