"""The command line: output, exit codes, help, and one line of text for every user error."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from megalodon_jax.cli.commands import COMMANDS
from megalodon_jax.cli.main import main, parse
from megalodon_jax.cli.run_config import to_config
from megalodon_jax.config import MeshConfig, ModelConfig, TrainConfig, load_config
from megalodon_jax.presets import config_names, configs_dir
from megalodon_jax.version import __version__
from tests.fixtures_runs import TINY_TABLES

ROOT = Path(__file__).resolve().parents[2]

TINY = (
    """
steps = 6
log_every = 1
eval_every = 0
final_eval_batches = 2
sample_tokens = 4
loss_chunk_size = 64
"""
    + TINY_TABLES
)


@pytest.fixture
def config_file(tmp_path, text_file) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(text_file=text_file, lr=5e-2))
    return path


def error_line(capsys) -> str:
    """The only line on stderr, so not a traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_train_generate_and_evaluate(config_file, text_file, tmp_path, capsys):
    run_dir = str(tmp_path / "run")
    assert main(["train", str(config_file), "--run_dir", run_dir, "--optim.lr", "1e-2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^step 6/6  loss \d\.\d{4}", out, re.MULTILINE)
    assert re.search(r"^final held-out bits per byte \d+\.\d{4}", out, re.MULTILINE)

    generate = ["generate", run_dir, "doc", "--max_tokens", "9"]
    assert main(generate) == 0
    first = capsys.readouterr().out
    assert first.startswith("doc")
    assert main(generate) == 0
    assert capsys.readouterr().out == first
    assert main([*generate, "--seed", "1"]) == 0
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
        (["generate", "nowhere", "text"], 1, "nowhere does not exist"),
        (["generate", "x", "text", "--top_p", "2"], 2, "top_p is 2.0"),
        (["evaluate", "--checkpoint", "nowhere", "--files", "a"], 1, "nowhere does not exist"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(arguments, code, message, capsys):
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
def test_errors_in_config_files_name_the_file(text, message, tmp_path, capsys):
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
def test_errors_in_options_name_the_option(option, message, config_file, capsys):
    assert main(["train", str(config_file), *option]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("content", "message"), [(None, "missing.txt"), (b"", "no "), (b"\xff\xfe\xff", "UTF-8")]
)
def test_unusable_data_is_one_line(content, message, config_file, tmp_path, capsys):
    path = tmp_path / "missing.txt"
    if content is not None:
        path.write_bytes(content)
    run_dir = tmp_path / "run"
    wrong = ["--data.files", str(path), "--run_dir", str(run_dir)]
    assert main(["train", str(config_file), *wrong]) == 1
    assert message in error_line(capsys)
    assert not run_dir.exists()


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0)])
def test_help_lists_the_commands(arguments, code, capsys):
    assert main(arguments) == code
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^[│ ]\s+• {name} ", out, re.MULTILINE), name
    for name in config_names():
        assert name in out, name


def test_help_of_a_command_lists_its_options(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("CONFIG", "--optim.lr FLOAT", "--model.preset", "--mesh.preset", "--resume"):
        assert option in out, option
    assert "Peak learning rate" in out
    # Booleans of tables take a value, those of the run are flags.
    assert "--model.swiglu {True,False}" in out
    assert "--resume {" not in out


@pytest.mark.parametrize("command", ["train", "plan"])
def test_help_texts_are_wrapped_at_the_terminal_only(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([command, "--help"]) == 0
    paragraphs: list[list[str]] = [[]]
    for line in capsys.readouterr().out.splitlines():
        # The help text of an option is indented below its name.
        if text := re.fullmatch(r"[│ ] {7}(\S.*?)[│ ]*", line):
            paragraphs[-1].append(text[1])
        else:
            paragraphs.append([])
    assert sum(len(lines) > 1 for lines in paragraphs) > 3
    for lines in paragraphs:
        assert all(len(line) >= 40 for line in lines[:-1]), lines


def test_help_does_not_import_jax():
    code = (
        "import sys\n"
        "from megalodon_jax.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'jax', 'flax', 'orbax', 'grain'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    for arguments in (["--help"], ["train", "--help"], ["generate", "--help"], ["--version"]):
        done = run_python(code, *arguments)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_generation_keeps_compiled_programs(trained_run, tmp_path, capsys):
    cache = tmp_path / "compiled"
    generate = ["generate", trained_run.run_dir, "a", "--n", "5", "--max_tokens", "9"]
    assert main([*generate, "--compilation_cache", str(cache)]) == 0
    assert any(path.name.startswith("jit_decode_block") for path in cache.iterdir())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megalodon-flax {__version__}\n"


def test_the_package_is_executable():
    done = subprocess.run(
        [sys.executable, "-m", "megalodon_jax", "--version"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"megalodon-flax {__version__}\n")


def parsed_config(*arguments: str) -> TrainConfig:
    command: Any = parse(["train", *arguments])
    return to_config(command.settings)


def test_a_number_may_be_none(config_file, capsys):
    for text in ("none", "None"):
        assert parsed_config(str(config_file), "--model.rope_base", text).model.rope_base is None
    assert parsed_config(str(config_file), "--model.rope_base", "1e5").model.rope_base == 1e5
    # The default of the command line is that of the file.
    path = config_file.with_name("without_positions.toml")
    path.write_text("[model]\nrope_base = 'none'")
    assert parsed_config(str(path)).model.rope_base is None
    assert parsed_config(str(path), "--model.output_size", "32000").model.output_size == 32_000
    with pytest.raises(SystemExit):
        parsed_config(str(path), "--model.rope_base", "half")
    assert "could not convert string to float: 'half'" in capsys.readouterr().err


def test_options_override_presets_and_presets_override_the_file(config_file):
    assert parsed_config(str(config_file)) == load_config(config_file)
    config = parsed_config(
        str(config_file), "--model.preset", "mega1.3B", "--model.num_layers", "3",
        "--mesh.preset", "fsdp_model", "--mesh.model", "4", "--optim.lr", "0.5",
    )  # fmt: skip
    assert config.model == ModelConfig.from_preset("mega1.3B", num_layers=3)
    assert config.mesh == MeshConfig.from_preset("fsdp_model", model=4)
    assert config.optim.lr == 0.5
    # The other tables are those of the file.
    assert config.data == load_config(config_file).data
    assert config.optim.warmup_steps == 2


def test_booleans_of_tables_take_true_or_false(config_file):
    for value in (True, False):
        config = parsed_config(
            str(config_file), "--model.swiglu", str(value), "--processes.detect", str(value)
        )
        assert config.model.swiglu is value
        assert config.processes.detect is value
    assert parsed_config(str(config_file), "--resume").resume
    assert not parsed_config(str(config_file)).resume


@pytest.mark.parametrize("text", [r"\0", r"\u0000"])
def test_a_separator_that_no_argument_can_hold_is_escaped(text, config_file):
    training = parse(["train", str(config_file), "--data.document_separator", text])
    assert to_config(training.settings).data.document_separator == "\0"
    files = ["evaluate", "--checkpoint", "run", "--files", r"a\0.txt"]
    evaluation = parse([*files, rf"--document_separator=\n{text}\\"])
    assert evaluation.document_separator == "\n\0\\"
    assert evaluation.files == (r"a\0.txt",)


def test_shipped_configurations_are_named_without_a_path():
    assert parsed_config("first_run") == load_config(configs_dir() / "first_run.toml")


def test_convert_prints_what_it_wrote(trained_run, tmp_path, capsys):
    target = tmp_path / "tiny.safetensors"
    assert main(["convert", trained_run.run_dir, str(target)]) == 0
    out = capsys.readouterr().out
    with safe_open(target, framework="np") as file:
        assert "embed.weight" in set(file.keys())
    assert re.search(rf"^wrote {target}: [\d,]+ parameters from {trained_run.run_dir} ", out, re.M)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_143(config_file, tmp_path):
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
    assert process.returncode == 143, err
    stopped = re.search(r"SIGTERM: stopped after step (\d+)", out)
    assert stopped is not None
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [stopped[1]]
    assert "Traceback" not in err
