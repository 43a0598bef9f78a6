"""Pages of docs/: their Python runs, their links and commands exist, the site builds.

README's example runs in tests/test_readme.py.
"""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megalodon_jax.cli.main import parse
from megalodon_jax.config import config_from_dict
from megalodon_jax.errors import ConfigError
from megalodon_jax.study import stage_runs
from megalodon_jax.study.definition import study_from_dict

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if not {"_build", "generated"} & set(path.relative_to(DOCS).parts)
)
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
TOML = re.compile(r"^```toml\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^megalodon (.+)$", flags=re.MULTILINE)
# Written by the build from files of the repository; see docs/generate_pages.py.
GENERATED = {"settings_tables", "preset_tables"}
API_PACKAGES = (
    "megalodon_jax",
    "megalodon_jax.study",
    "megalodon_jax.modules",
    "megalodon_jax.config",
    "megalodon_jax.checkpoints",
    "megalodon_jax.evaluation",
    "megalodon_jax.evaluation.streaming",
    "megalodon_jax.evaluation.summary",
    "megalodon_jax.generate",
    "megalodon_jax.data.chat_template",
    "megalodon_jax.inference.conversation",
    "megalodon_jax.inference.engine",
    "megalodon_jax.inference.requests",
    "megalodon_jax.inference.sessions",
    "megalodon_jax.inference.text",
    "megalodon_jax.interop.convert",
    "megalodon_jax.interop.huggingface",
    "megalodon_jax.interop.lm_eval",
    "megalodon_jax.interop.released",
    "megalodon_jax.interop.torch_file",
    "megalodon_jax.pretrained",
    "megalodon_jax.serve.engine_thread",
    "megalodon_jax.serve.server",
    "megalodon_jax.serve.settings",
    "megalodon_jax.training.loop",
    "megalodon_jax.training.step",
    "pallas_kernels.cema",
    "pallas_kernels.timestep_norm",
    "pallas_kernels.chunk_attention",
    "pallas_kernels.rowwise",
    "pallas_kernels.chunk_decode",
    "pallas_kernels.state_step",
    "pallas_kernels.norm_state_step",
    "pallas_kernels.skinny_matmul",
)


def page_id(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


def with_python() -> list[Path]:
    # tests/packaging/test_wheel.py runs the quick start's lines, in a fresh environment.
    elsewhere = DOCS / "quick_start.md"
    return [page for page in PAGES if page != elsewhere and PYTHON.search(page.read_text())]


# Pages whose code compiles for more than five seconds.
LONG_PAGES = {
    "encoders.md", "fine_tuning.md", "flax.md", "huggingface.md", "inference.md", "lm_eval.md",
    "long_context_evaluation.md", "modules.md", "operations.md", "streaming.md", "transformer.md",
    "your_own_loop.md",
}  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.name in LONG_PAGES else ())
        for page in with_python()
    ],
    ids=page_id,
)
# Qwix 0.1.8 reads Variables by names that Flax has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")
def test_python_blocks_run_in_order(page: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": "page"}
    for number, block in enumerate(PYTHON.findall(page.read_text()), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_exist(page: Path):
    generated = GENERATED | set(_generate_pages().INCLUDED.values())
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", text):
        target = (page.parent / link).resolve()
        if target.parent == DOCS / "generated":
            assert target.stem in generated, f"{page.name}: {link}"
        else:
            assert target.exists(), f"{page.name}: {link}"


@pytest.mark.slow
def test_commands_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("my_run.toml", "config.toml"):
        (tmp_path / name).write_text("")
    commands = {line for page in PAGES for line in COMMAND.findall(page.read_text())}
    assert commands
    for command in sorted(commands):
        arguments = shlex.split(command, comments=True)
        try:
            parse(arguments)
        except (SystemExit, ConfigError) as error:
            pytest.fail(f"megalodon {command}: {error}")


def test_files_named_in_pages_exist():
    for page in PAGES:
        for path in re.findall(r"\bconfigs/[\w/.]+\.toml", page.read_text()):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"


def test_toml_blocks_are_configurations_and_studies():
    blocks = [block for page in PAGES for block in TOML.findall(page.read_text())]
    assert blocks
    for block in blocks:
        table = tomllib.loads(block)
        if "variants" not in table:
            config_from_dict(table)
            continue
        study = study_from_dict(table)
        assert [run.config("x") for run in stage_runs(study, study.stages[0])]


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text()
    toctrees = "".join(re.findall(r"```{toctree}(.*?)```", index, flags=re.DOTALL))
    listed = {line for line in toctrees.split("\n") if line and not line.startswith(":")}
    pages = {page_id(page).removesuffix(".md") for page in PAGES} - {"index"}
    included = {f"generated/{name}" for name in _generate_pages().INCLUDED.values()}
    assert listed == pages | included


@pytest.mark.parametrize("package", API_PACKAGES)
def test_api_pages_have_every_public_name(package: str):
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)$", text, flags=re.MULTILINE))
    objects = {_find(name) for name in documented if not name.startswith(_DATA)}
    names = documented & {f"{package}.{name}" for name in _public_names(package)}
    missing = [
        name
        for name, value in _public_names(package).items()
        if f"{package}.{name}" not in names and value not in objects
    ]
    assert not missing


_DATA = tuple(
    f"megalodon_jax.config.{name}"
    for name in (
        "DType", "InitMode", "Remat", "ModelOp", "AnyModelConfig", "Attention", "WeightFormat",
        "KvFormat",
    )
)  # fmt: skip


def _public_names(package: str) -> dict:
    module = importlib.import_module(package)
    if hasattr(module, "__all__"):
        names = [name for name in module.__all__ if name != "__version__"]
        return {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == package
        and callable(value)
        and not name.startswith("_")
    }


def _find(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _generate_pages():
    spec = importlib.util.spec_from_file_location("generate_pages", DOCS / "generate_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_page_has_every_setting():
    tables = _generate_pages().settings_tables()
    for setting in ("steps", "model.chunk_size", "data.packing", "optim.lr", "mesh.chunk"):
        assert f"| `{setting}` |" in tables


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra 'docs'")
    pytest.importorskip("myst_nb", reason="needs the extra 'docs'")
    command = ["-m", "sphinx", "-W", "-b", "html", "-d", str(tmp_path / "doctrees")]
    # The notebooks train: on one device with optimized programs, as a reader's do.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *command, str(DOCS), str(tmp_path / "html")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "html" / "configuration.html").is_file()
