"""Which kind of path a text is; an impossible one is refused before anything is created."""

import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest

from megalodon_jax.checkpoints import RunCheckpoints, load_model
from megalodon_jax.cli.main import main
from megalodon_jax.config import DataConfig, TrainConfig
from megalodon_jax.config.run import locations
from megalodon_jax.data.find_files import find_files
from megalodon_jax.errors import ConfigError
from megalodon_jax.storage.location import as_path, is_store, location_problem, scheme_of
from megalodon_jax.training.loop import train
from tests.fixtures_runs import TINY_TABLES


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("runs/first", ""), ("/a/b", ""), ("~/run", ""), ("a:b/c", ""), ("C:/run", ""), ("", ""),
        ("gs://bucket/run", "gs"), ("s3://bucket/a/*.txt", "s3"), ("gs://bucket", "gs"),
    ],
)  # fmt: skip
def test_schemes(text, scheme):
    assert scheme_of(text) == scheme
    assert is_store(text) == bool(scheme)
    assert isinstance(as_path(text), Path) == (not scheme)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://host/run", "unknown scheme http:; use gs:// or s3://, or a local path"),
        ("hdfs://host/run", "unknown scheme hdfs:"),
        ("GS://bucket/run", "unknown scheme GS:"),
        # `pathlib` turns a URL into this path.
        ("gs:/bucket/run", "write gs://BUCKET/PATH"),
        ("s3:///run", "write s3://BUCKET/PATH"),
        ("gs://", "write gs://BUCKET/PATH"),
    ],
)
def test_what_is_neither_is_refused(text, message):
    assert message in (location_problem(text) or "")
    for make in (
        lambda: TrainConfig(run_dir=text),
        lambda: TrainConfig(init_from=text),
        lambda: DataConfig(files=("a.txt", text)),
        lambda: DataConfig(heldout_files=(text,)),
        lambda: DataConfig(tokenizer=text),
        lambda: find_files([text]),
        lambda: load_model(text),
        lambda: RunCheckpoints(text),
    ):
        with pytest.raises(ConfigError, match=message.split(";")[0]):
            make()


def test_a_local_cache_of_compiled_programs_is_asked_for():
    with pytest.raises(ConfigError, match="compilation_cache is 'gs://b/c'; must be a local path"):
        TrainConfig(compilation_cache="gs://b/c")


@pytest.mark.parametrize("url", ["az://bucket/run", "gs:/bucket/run"])
def test_commands_refuse_an_unknown_scheme_and_create_nothing(
    url, text_file, tmp_path, monkeypatch, capsys
):
    toml = tmp_path / "run.toml"
    toml.write_text(TINY_TABLES.format(text_file=text_file, lr=1e-2))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for arguments in (
        ["train", str(toml), "--run_dir", url],
        ["train", str(toml), "--data.files", url],
        ["evaluate", "--checkpoint", url, "--files", str(text_file)],
        ["generate", url, "text"],
        ["verify", url],
        ["convert", url, "new.safetensors"],
        ["convert", str(text_file), url],
    ):
        assert main(arguments) == 2, arguments
        assert url in capsys.readouterr().err
    assert os.listdir(here) == []


@pytest.mark.parametrize(("url", "extra"), [("gs://bucket/run", "gcs"), ("s3://bucket/run", "s3")])
@pytest.mark.parametrize("setting", ["run_dir", "init_from", "files", "heldout_files", "tokenizer"])
def test_a_package_that_is_not_installed_is_named_before_anything_is_created(
    config, tmp_path, monkeypatch, url, extra, setting
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("gcsfs", "s3fs") else find_spec(name),
    )
    monkeypatch.chdir(tmp_path)
    value = (url,) if setting.endswith("files") else url
    if setting in ("run_dir", "init_from"):
        config = dataclasses.replace(config, **{setting: value})
    else:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, **{setting: value})
        )
    assert url in locations(config)
    with pytest.raises(ConfigError, match=rf'pip install "megalodon-flax\[{extra}\]"'):
        train(dataclasses.replace(config, compilation_cache=str(tmp_path / "compiled")))
    assert os.listdir(tmp_path) == []
