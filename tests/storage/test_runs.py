"""Runs whose data, tokenizer and directory are in a store, and the commands that read them."""

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import chex
import pytest
from flax import nnx

from megalodon_jax.checkpoints import load_model
from megalodon_jax.cli.main import main
from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import CheckpointError
from megalodon_jax.training import loop, run_files
from megalodon_jax.training.loop import train


@pytest.fixture
def in_store(stored, store) -> TrainConfig:
    """The tiny run with all it reads and writes in the store."""
    text = Path(stored.data.files[0])
    url = store.write(f"text/{text.name}", text.read_bytes())
    return dataclasses.replace(stored, data=dataclasses.replace(stored.data, files=(url,)))


def params_of(run_dir: object, step: int):
    return nnx.split(load_model(str(run_dir), step=step).model, nnx.Param)[1]


def losses(content: bytes) -> dict[int, float]:
    lines = map(json.loads, content.decode().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_a_run_in_a_store_equals_one_on_a_disk(in_store, store, trained_run, tmp_path, capsys):
    class StopAt3(loop.ProgressDisplay):
        def advance(self, step: int) -> None:
            if step == 3:
                signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "ProgressDisplay", StopAt3)
        assert train(in_store).step == 3
    result = train(dataclasses.replace(in_store, resume=True))
    assert result.step == 6
    chex.assert_trees_all_equal(params_of(in_store.run_dir, 6), params_of(trained_run.run_dir, 6))
    # The metrics of both starts are in one file.
    local = losses(Path(trained_run.run_dir, "metrics.jsonl").read_bytes())
    assert losses(store.read("run/metrics.jsonl")) == local
    assert sorted(local) == [1, 2, 3, 4, 5, 6]
    assert json.loads(store.read("run/run_time.json"))["starts"] == 2
    assert json.loads(store.read("run/config.json"))["run_dir"] == in_store.run_dir
    events = [name for name in store.names() if name.startswith("run/tensorboard/")]
    assert events
    assert all(store.read(name) for name in events)
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and "run" in path.name]

    capsys.readouterr()
    text = store.write("text/heldout.txt", b"document: ab cab c")
    commands = (
        ["generate", in_store.run_dir, "doc", "--max_tokens", "4"],
        ["evaluate", "--checkpoint", in_store.run_dir, "--files", text],
        ["verify", in_store.run_dir],
    )
    outputs = []
    for run in (in_store, trained_run):
        for command in commands:
            place = [word.replace(in_store.run_dir, run.run_dir) for word in command]
            assert main(place) == 0, capsys.readouterr()
        outputs.append(capsys.readouterr().out.split("step 3: good")[0])
    assert outputs[0] == outputs[1]
    assert "bits per byte" in outputs[0]


@pytest.mark.slow
def test_a_run_in_a_store_is_converted_and_started_from(
    in_store, store, trained_run, tmp_path, capsys
):
    again, file = f"{store.url}/again", str(tmp_path / "new.safetensors")
    assert main(["convert", trained_run.run_dir, again]) == 0
    expected = params_of(trained_run.run_dir, 6)
    chex.assert_trees_all_equal(params_of(again, 0), expected)
    assert main(["convert", again, file]) == 0
    assert main(["convert", file, f"{store.url}/third"]) == 0
    chex.assert_trees_all_equal(params_of(f"{store.url}/third", 0), expected)
    started = dataclasses.replace(in_store, init_from=again, sample_tokens=0)
    assert train(started).step == 6
    assert losses(store.read("run/metrics.jsonl"))[1] < 4.5
    assert main(["convert", again, f"{store.url}/third"]) == 1
    assert f"{store.url}/third exists and is not overwritten" in capsys.readouterr().err
    assert main(["convert", again, f"{store.url}/new.safetensors"]) == 1
    assert "is in an object store" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_moves_between_a_disk_and_a_store(finished, stored, store, tmp_path, trained_run):
    for path in Path(finished.run_dir).rglob("*"):
        if path.is_file():
            store.write(f"run/{path.relative_to(finished.run_dir)}", path.read_bytes())
    assert main(["verify", stored.run_dir]) == 0
    longer = dataclasses.replace(stored, resume=True, steps=8, sample_tokens=0)
    assert train(longer).step == 8
    copy = tmp_path / "copy_of_store"
    for name in store.names():
        path = copy / name.removeprefix("run/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(name))
    shutil.rmtree(copy / ".lock")
    assert main(["verify", str(copy)]) == 0
    chex.assert_trees_all_equal(params_of(copy, 6), params_of(trained_run.run_dir, 6))
    on_disk = dataclasses.replace(longer, run_dir=str(copy), steps=9)
    assert train(on_disk).step == 9
    lines = losses((copy / "metrics.jsonl").read_bytes())
    assert sorted(lines) == list(range(1, 10))


def test_logs_are_copied_at_intervals_and_at_the_end(store, monkeypatch):
    monkeypatch.setattr(run_files, "COPY_SECONDS", 0.05)
    run_dir = f"{store.url}/run"
    store.write("run/metrics.jsonl", b"earlier\n")
    with run_files.open_run_files(run_dir) as files:
        with files.copies(lambda: None, continue_earlier=True):
            path = files.local / "metrics.jsonl"
            assert path.read_bytes() == b"earlier\n"
            with path.open("ab") as lines:
                lines.write(b"new\n")
            for _ in range(200):
                if store.read("run/metrics.jsonl") == b"earlier\nnew\n":
                    break
                time.sleep(0.05)
            else:
                pytest.fail("never copied")
            (files.local / "deep").mkdir()
            (files.local / "deep" / "last").write_bytes(b"1")
        scratch = files.local
    assert store.read("run/deep/last") == b"1"
    assert not scratch.exists()


def test_metrics_that_cannot_be_copied_end_in_an_error(store):
    def write(files: run_files.RunFiles) -> None:
        with files.copies(lambda: None, continue_earlier=True):
            (files.local / "metrics.jsonl").write_bytes(b"1\n")
            store.refusal.touch()

    with (
        run_files.open_run_files(f"{store.url}/run") as files,
        pytest.raises(CheckpointError, match="metrics and logs cannot be copied to"),
    ):
        write(files)
