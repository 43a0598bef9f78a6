"""README's library example runs, and the files and commands that it names exist."""

import re
from pathlib import Path

import pytest

import megalodon_jax
from megalodon_jax.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


LOAD_EXAMPLE, FRESH_EXAMPLE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_load_example_runs(trained_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(trained_run.run_dir)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(LOAD_EXAMPLE, scope)
    assert capsys.readouterr().out
    assert megalodon_jax.load("first_hf").model.config == scope["model"].config


@pytest.mark.slow
def test_library_example_runs():
    example = FRESH_EXAMPLE
    preset = 'ModelConfig.from_preset("mega200M", dtype="bfloat16")'
    assert preset in example
    # The same lines on a model that a test can afford.
    small = (
        'ModelConfig.from_preset("mega200M", dtype="bfloat16", num_layers=1, model_dim=32, z_dim=8,'
        " value_dim=32, ffn_hidden_dim=32, norm_num_groups=4, chunk_size=512)"
    )
    scope: dict = {}
    exec(example.replace(preset, small), scope)
    assert scope["logits"].shape == (2, 1100, 32_000)
    assert scope["cache"].position.tolist() == [3000, 3000]


def test_links_and_commands_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
    for command in re.findall(r"^megalodon (\w+)", README, flags=re.MULTILINE):
        assert command in COMMANDS, command
    for path in re.findall(r"configs/\w+\.toml", README):
        assert (ROOT / path).is_file(), path
