"""The wheel, installed alone, trains: it holds the shipped configurations and needs no checkout.

The lines of docs/quick_start.md from a run to other tools run in a fresh environment.

The source distribution is built first and the wheel from it, as `pip` does from a package index;
this needs the index, for the build's backend. Dependencies are those of the current environment.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from megalodon_jax.version import __version__

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(*arguments: object, cwd: Path, path: Path | None = None) -> str:
    """Runs this Python's `-m arguments...`, importing from `path` first; returns its output."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Without the eight virtual devices of the other tests.
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run("pip", "install", "-q", "--target", folder / "tools", "hatchling", cwd=folder)
    run("hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT, path=folder / "tools")
    return folder / f"megalodon_flax-{__version__}.tar.gz"


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    run("pip", "wheel", "-q", "--no-deps", "-w", sdist.parent, sdist, cwd=sdist.parent)
    return sdist.parent / f"megalodon_flax-{__version__}-py3-none-any.whl"


def test_sdist_holds_what_its_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    listing = subprocess.run(
        ["git", "ls-files", "configs", "docs", "megalodon_jax", "pallas_kernels", "tests"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode != 0:
        pytest.skip("git lists the files that must be there, and this is not a checkout")
    # Tests read README's links, and run the entry script.
    needed = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "train.py"}
    needed |= {name for name in listing.stdout.splitlines() if (ROOT / name).is_file()}
    assert needed <= packed


def test_wheel_holds_types_and_configurations(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert {"megalodon_jax/py.typed", "pallas_kernels/py.typed"} <= packed
    for file in (ROOT / "configs").rglob("*.toml"):
        assert f"megalodon_jax/{file.relative_to(ROOT).as_posix()}" in packed
    # The code that goes into folders of the Hugging Face form.
    code = "megalodon_jax/interop/huggingface/torch_source"
    assert {f"{code}/modeling_megalodon.py", f"{code}/configuration_megalodon.py"} <= packed
    assert not any(name.startswith(("tests/", "docs/")) for name in packed)


def test_installed_wheel_trains_in_an_empty_folder(wheel, tmp_path):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    run("pip", "install", "-q", "--no-deps", "--target", installed, wheel, cwd=empty)
    steps = ["--steps", "5", "--optim.warmup_steps", "2"]
    steps += ["--final_eval_batches", "2", "--sample_tokens", "8"]
    output = run("megalodon_jax", "train", "first_run", *steps, cwd=empty, path=installed)
    assert "step 5/5" in output
    assert (empty / "runs" / "first" / "metrics.jsonl").is_file()
    # Not the checkout, which the environment may have installed too.
    (empty / "origin.py").write_text("import megalodon_jax; print(megalodon_jax.__file__)")
    assert run("origin", cwd=empty, path=installed).startswith(str(installed))


def test_printed_lines_run_in_a_fresh_environment(wheel, tmp_path):
    """Only the wheel and what it requires; transformers where the tests' own Python has it."""
    page = (ROOT / "docs" / "quick_start.md").read_text()
    section = page[page.index("## From a run to other tools") :]
    ours, theirs = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:2]
    assert len([line for line in ours.splitlines() if line]) == 12
    venv = tmp_path / "venv"
    run("venv", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

    def execute(*arguments: object) -> str:
        result = subprocess.run(
            list(map(str, arguments)),
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    execute(python, "-m", "pip", "install", "-q", wheel)
    short = ["--steps", "5", "--optim.warmup_steps", "2", "--final_eval_batches", "2"]
    execute(venv / "bin" / "megalodon", "train", "first_run", *short, "--sample_tokens", "8")
    (tmp_path / "ours.py").write_text(ours + "print(exported.out_avals[0].shape)\n")
    assert execute(python, "ours.py").rstrip().endswith("(1, 64, 257)")
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        (tmp_path / "theirs.py").write_text(theirs)
        assert "MegalodonForCausalLM" in execute(sys.executable, "theirs.py")
