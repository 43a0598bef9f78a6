"""Tests the oldest and the newest JAX that pyproject.toml allows, on Python 3.12 and 3.13.

    python tests/packaging/check_versions.py
    python tests/packaging/check_versions.py --python python3.13 --jax oldest

Run by hand before a release. Each of the four combinations gets a fresh environment (1 GB, removed
afterwards), a selection of quick tests in it, and three training steps: 6.6 minutes for Python 3.13
with the oldest JAX on two busy CPU cores, so half an hour for all. The interpreters must be
installed; packages come from the index that pip is configured for. The exit code is 1 if a
combination failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--steps", "3", "--optim.warmup_steps", "2")
Age = Literal["oldest", "newest"]
# Code that depends on versions: configuration, data, checkpoints, modules, and one operation's
# kernels of either backend in the interpreter. Warnings are errors, so deprecations are found.
TESTS = [
    "tests/config",
    "tests/data/test_sources.py",
    "tests/data/test_tokenizer.py",
    "tests/test_optimizer.py",
    "tests/interop",
    "tests/checkpoints/test_manager.py",
    "tests/modules/test_golden_modules.py",
    "tests/kernels/cema/test_mosaic_gpu_context_parallel.py",
    "tests/kernels/chunk_attention/test_pallas_tpu.py",
]


def jax_requirement(age: Age) -> str:
    """The requirement that selects one end of the allowed range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (allowed,) = (line for line in project["dependencies"] if re.match(r"jax\b", line))
    bounds = re.fullmatch(r"jax>=([\d.]+),<[\d.]+", allowed)
    if bounds is None:
        raise ValueError(f"{allowed!r} is not of the form jax>=OLDEST,<EXCLUDED")
    return f"jax=={bounds[1]}" if age == "oldest" else allowed


def check(python: str, age: Age) -> bool:
    """Installs one combination and runs the tests in it; prints what failed."""
    start = time.monotonic()
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "JAX_PLATFORMS": "cpu",
    }

    def run(*command: object, cwd: Path = ROOT) -> bool:
        line = [str(word) for word in command]
        result = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            print(" ".join(line), result.stdout[-4000:], result.stderr[-4000:], sep="\n")
        return result.returncode == 0

    with tempfile.TemporaryDirectory() as folder:
        venv, empty = Path(folder, "venv"), Path(folder, "empty")
        empty.mkdir()
        inside = venv / "bin" / "python"
        passed = (
            run(python, "-m", "venv", venv)
            and run(
                inside, "-m", "pip", "install", "-q", "-e", f"{ROOT}[dev]", jax_requirement(age)
            )
            and run(
                inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS
            )
            and run(venv / "bin" / "megalodon", "train", "first_run", *SHORT, cwd=empty)
        )
        versions = _installed(inside) if inside.exists() else ""
    minutes = (time.monotonic() - start) / 60
    print(f"{'ok' if passed else 'FAILED'}: {python}, {age} jax {versions} ({minutes:.1f} minutes)")
    return passed


def _installed(python: Path) -> str:
    code = (
        "import importlib.metadata as m; "
        "print(*(f'{n} {m.version(n)}' for n in ('jax', 'jaxlib', 'flax', 'orbax-checkpoint')), "
        "sep=', ')"
    )
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return f"({result.stdout.strip() or 'not installed'})"


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests both ends of the allowed versions.")
    parser.add_argument("--python", nargs="+", default=["python3.12", "python3.13"])
    parser.add_argument("--jax", nargs="+", choices=["oldest", "newest"], default=None)
    options = parser.parse_args()
    ages: list[Age] = options.jax or ["oldest", "newest"]
    if missing := [python for python in options.python if shutil.which(python) is None]:
        parser.error(f"no interpreter {', '.join(missing)}; give commands such as python3.13")
    passed = [check(python, age) for python in options.python for age in ages]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
