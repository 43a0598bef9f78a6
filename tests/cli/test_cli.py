"""The command line: what it prints, what it returns, and one clear line for every mistake."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalodon_jax.cli.main import main

ROOT = Path(__file__).resolve().parents[2]

TINY = """
steps = 6
log_every = 1
eval_every = 0
final_eval_batches = 2
sample_tokens = 4
loss_chunk_size = 64
[model]
num_layers = 1
model_dim = 8
z_dim = 4
value_dim = 8
num_heads = 1
ffn_hidden_dim = 8
cema_ndim = 2
chunk_size = 16
vocab_size = 257
norm_num_groups = 2
cema_implementation = "reference"
timestep_norm_implementation = "reference"
attention_implementation = "reference"
[data]
source = "files"
files = ["{text_file}"]
document_separator = "\\u0000"
seq_len = 32
batch_size = 2
heldout_fraction = 0.2
[optim]
lr = 5e-2
warmup_steps = 2
"""


@pytest.fixture
def config_file(tmp_path, text_file) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(text_file=text_file))
    return path


def error_line(capsys) -> str:
    """The one line on the error stream; there must be no traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_train_generate_and_evaluate(config_file, text_file, tmp_path, capsys):
    run_dir = str(tmp_path / "run")
    assert main(["train", str(config_file), "--run_dir", run_dir, "--optim.lr", "1e-2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^step 6/6  loss \d\.\d{4}", out, re.MULTILINE)
    assert re.search(r"^final held-out bits per byte \d+\.\d{4}", out, re.MULTILINE)

    ask = ["generate", "--checkpoint", run_dir, "--prompt", "doc", "--max_tokens", "9"]
    assert main(ask) == 0
    first = capsys.readouterr().out
    assert first.startswith("doc")
    assert main(ask) == 0
    assert capsys.readouterr().out == first
    assert main([*ask, "--seed", "1"]) == 0
    assert capsys.readouterr().out != first

    evaluate = ["evaluate", "--checkpoint", run_dir, "--files", str(text_file)]
    assert main([*evaluate, "--document_separator", "\0", "--piece_length", "64"]) == 0
    num_bytes = len(text_file.read_bytes().replace(b"\0", b""))
    assert f"bytes {num_bytes:,}" in capsys.readouterr().out

    again = ["train", str(config_file), "--run_dir", run_dir, "--optim.lr", "1e-2"]
    assert main(again) == 2
    assert "--resume" in error_line(capsys)
    assert main([*again, "--resume"]) == 0
    assert "resumed at step 6" in capsys.readouterr().out
    assert main([*again, "--resume", "--model.z_dim", "8"]) == 1
    assert "z_dim is 4 in the checkpoint, 8 now" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["trian"], 2, "did you mean 'train'"),
        (["train"], 2, "no config given"),
        (["train", "first_rum"], 2, "did you mean 'first_run'"),
        (["train", "nowhere.toml"], 2, "cannot read config nowhere.toml"),
        (["generate", "--checkpoint", "nowhere"], 1, "nowhere has no checkpoints"),
        (["generate", "--checkpoint", "x", "--top_p", "2"], 2, "top_p is 2.0"),
        (["evaluate", "--checkpoint", "nowhere", "--files", "a"], 1, "nowhere has no checkpoints"),
    ],
)
def test_mistakes_are_one_line_and_a_code(arguments, code, message, capsys):
    assert main(arguments) == code
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "did you mean 'steps'"),
        ("[optim]\nlr = 'fast'", "fast"),
        ("[model]\nz_dim = 7", "even"),
        ("steps = ", "not valid TOML"),
        ("[data]\nsource = 'files'", "data.files is empty"),
    ],
)
def test_wrong_config_files_are_named(text, message, tmp_path, capsys):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    line = error_line(capsys)
    assert message in line
    assert str(path) in line


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--optim.lrr", "1"], "--optim.lr"),
        (["--optim.lr", "-1"], "must be positive"),
        (["--model.remat", "blok"], "'block'"),
        (["--steps", "many"], "many"),
    ],
)
def test_wrong_options_are_named(option, message, config_file, capsys):
    assert main(["train", str(config_file), *option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [(None, "missing.txt"), (b"", "no "), (b"\xff\xfe\xff", "UTF-8")]
)
def test_data_that_cannot_be_used_is_one_line(content, message, config_file, tmp_path, capsys):
    path = tmp_path / "missing.txt"
    if content is not None:
        path.write_bytes(content)
    run_dir = tmp_path / "run"
    wrong = ["--data.files", str(path), "--run_dir", str(run_dir)]
    assert main(["train", str(config_file), *wrong]) == 1
    assert message in error_line(capsys)
    assert not run_dir.exists()


def test_help_lists_the_documented_options(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--optim.lr FLOAT" in out
    assert "Peak learning rate" in out
    assert main(["--help"]) == 0
    assert "generate --checkpoint" in capsys.readouterr().out


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(config_file, tmp_path):
    run_dir = tmp_path / "run"
    command = [
        sys.executable, str(ROOT / "train.py"), str(config_file), "--run_dir", str(run_dir),
        "--steps", "1000000",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        metrics = run_dir / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline, "no step in two minutes"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    stopped = re.search(r"SIGTERM: stopped after step (\d+)", out)
    assert stopped is not None
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [stopped[1]]
    assert "Traceback" not in err
