"""The commands of docs/fine_tuning.md, in order, with a tiny base in place of that of first_run."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

import megalodon_jax
from megalodon_jax.cli.main import main
from megalodon_jax.config import config_from_dict, load_config
from megalodon_jax.presets import configs_dir
from tests.docs.test_docs import COMMAND, DOCS, TOML
from tests.fixtures_runs import TINY_TABLES

PAGE = (DOCS / "fine_tuning.md").read_text()
TINY = tomllib.loads(TINY_TABLES.format(text_file="", lr=1.0))["model"]


def as_toml(table: dict) -> str:
    """TOML of a table whose entries are values and tables of values."""
    lines = [f"{name} = {json.dumps(v)}" for name, v in table.items() if not isinstance(v, dict)]
    for name, entries in table.items():
        if isinstance(entries, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in entries.items())]
    return "\n".join(lines)


def test_the_model_of_the_page_is_that_of_first_run():
    (block,) = TOML.findall(PAGE)
    config = config_from_dict(tomllib.loads(block))
    assert config.model == load_config(configs_dir() / "first_run.toml").model
    shipped = load_config(configs_dir() / "fine_tune.toml")
    assert shipped.model == config.model
    assert (shipped.lora.rank, shipped.task) == (8, "sft")


@pytest.mark.slow
def test_commands_run_in_order(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_run.run_dir, tmp_path / "runs" / "first")
    (examples,) = re.findall(r"^```json\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    Path("examples.jsonl").write_text(examples)
    (block,) = TOML.findall(PAGE)
    table = {**tomllib.loads(block), "model": TINY}
    Path("my_run.toml").write_text(as_toml(table))
    text = {"files": list(trained_run.data.files), "document_separator": "\0"}
    base = {"steps": 2, "sample_tokens": 0, "optim": {"warmup_steps": 1}, "data": text}
    Path("first_run.toml").write_text(as_toml({**base, "model": TINY}))
    outputs = []
    for line in COMMAND.findall(PAGE):
        arguments = shlex.split(line)
        if arguments[:2] == ["train", "first_run"]:
            arguments[1] = "first_run.toml"
        assert main(arguments) == 0, line
        outputs.append(capsys.readouterr().out)
    assert len(outputs) == 7
    assert "parameters of LoRA beside" in outputs[0]
    assert "step 120" in outputs[1]
    assert {path.name for path in Path("adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    merged, tokenizer = megalodon_jax.load("tuned_hf")
    assert tokenizer is not None
    assert merged.config.num_layers == TINY["num_layers"]
    assert megalodon_jax.load("grown").model.config.vocab_size == 259
    assert "model.chunk_size was 16 and is 256" in outputs[-1]
