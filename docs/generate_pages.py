"""Pages that the build writes into docs/generated/: tables of settings, READMEs of packages."""

import dataclasses
import re
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from megalodon_jax.cli.help import field_docs
from megalodon_jax.config import (
    DataConfig,
    EncoderConfig,
    ExamplesConfig,
    HeldoutSet,
    LoraConfig,
    MeshConfig,
    MixtureSource,
    ModelConfig,
    OptimConfig,
    ProcessesConfig,
    SftConfig,
    TrainConfig,
    TransformerConfig,
    TransformerEncoderConfig,
    model_preset,
)
from megalodon_jax.config.ranges import Range, plain_type, range_of
from megalodon_jax.presets import config_names, preset_names, read_preset

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
# Files outside docs/ that are pages of the site, and the page's name in docs/generated/.
INCLUDED = {
    "pallas_kernels/cema/README.md": "cema",
    "pallas_kernels/timestep_norm/README.md": "timestep_norm",
    "pallas_kernels/chunk_attention/README.md": "chunk_attention",
    "pallas_kernels/rowwise/README.md": "rowwise",
    "pallas_kernels/chunk_decode/README.md": "chunk_decode",
    "pallas_kernels/state_step/README.md": "state_step",
    "pallas_kernels/norm_state_step/README.md": "norm_state_step",
    "pallas_kernels/skinny_matmul/README.md": "skinny_matmul",
    "megalodon_jax/bench/README.md": "benchmarks",
    "megalodon_jax/plan/README.md": "plan",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
}
# The TOML tables and the classes of their settings; those of a model depend on its kind.
TABLES: tuple[tuple[str, type], ...] = (
    ("", TrainConfig),
    ("model", ModelConfig),
    ("model", TransformerConfig),
    ("model", EncoderConfig),
    ("model", TransformerEncoderConfig),
    ("data", DataConfig),
    ("data.sources", MixtureSource),
    ("data.heldout_sets", HeldoutSet),
    ("examples", ExamplesConfig),
    ("optim", OptimConfig),
    ("lora", LoraConfig),
    ("sft", SftConfig),
    ("mesh", MeshConfig),
    ("processes", ProcessesConfig),
)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")


def write_all() -> None:
    """Writes every generated page; unchanged files keep their time stamps."""
    GENERATED.mkdir(exist_ok=True)
    _write(GENERATED / "settings_tables.md", settings_tables())
    _write(GENERATED / "preset_tables.md", preset_tables())
    for source, page in INCLUDED.items():
        text = (ROOT / source).read_text()
        _write(GENERATED / f"{page}.md", rewrite_links(text, (ROOT / source).parent, GENERATED))


def rewrite_links(text: str, folder: Path, page_folder: Path | None = None) -> str:
    """Relative links of a page, for the site.

    Args:
      text: Markdown.
      folder: what the links are relative to.
      page_folder: where the page lies in the site; None: in `folder`.
    """
    page_folder = page_folder or folder

    def rewrite(match: re.Match[str]) -> str:
        label, link = match.groups()
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match.group(0)
        name = target.relative_to(ROOT).as_posix()
        if name in INCLUDED:
            target = GENERATED / f"{INCLUDED[name]}.md"
        elif not target.is_relative_to(DOCS):
            return label if label.strip("`/") in name else f"{label} (`{name}`)"
        relative = target.relative_to(page_folder, walk_up=True).as_posix()
        return f"[{label}]({relative}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(rewrite, text)


def settings_tables() -> str:
    """One table per TOML table: setting, type or choices and range, default, description."""
    parts = []
    tables = {name for name, _ in TABLES}
    for name, config in TABLES:
        # A dotted name is an array of tables.
        brackets = f"[[{name}]]" if "." in name else f"[{name}]"
        title = f"`{brackets}`" if name else "The run (top level of the file)"
        if name == "model":
            title += f", kind `{config().kind}`"
        docs, lines = field_docs(config), []
        for entry in dataclasses.fields(config):
            if name or entry.name not in tables:
                cells = (
                    f"`{name}.{entry.name}`" if name else f"`{entry.name}`",
                    _type_text(plain_type(entry.type)) + _range_text(entry.type),
                    "" if entry.default in (None, MISSING) else f"`{_toml(entry.default)}`",
                    _escape(docs[entry.name]),
                )
                lines.append(f"| {' | '.join(cells)} |")
        header = "| setting | type | default | |\n|---|---|---|---|"
        parts.append(f"## {title}\n\n{config.__doc__}\n\n{header}\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def preset_tables() -> str:
    """Shipped models, meshes and runs."""
    models = {name: model_preset(name) for name in preset_names("models")}
    columns = ("kind", "num_layers", "model_dim", "num_heads", "vocab_size")
    lines = [f"| `model.preset` | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, model in models.items():
        cells = [getattr(model, column) for column in columns]
        values = " | ".join(cell if isinstance(cell, str) else f"{cell:,}" for cell in cells)
        lines.append(f"| `{name}` | {values} |")
    meshes = ["| `mesh.preset` | axes |", "|---|---|"]
    for name in preset_names("meshes"):
        sizes = ", ".join(f"{axis} {size}" for axis, size in read_preset("meshes", name).items())
        meshes.append(f"| `{name}` | {sizes or 'one device'} |")
    runs = ", ".join(f"`{name}`" for name in config_names())
    return "\n".join([*lines, "", *meshes, "", f"Shipped runs: {runs}.", ""])


def _type_text(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    choices = [entry for entry in get_args(kind) if entry is not type(None)]
    if get_origin(kind) is tuple:
        return f"list of {choices[0].__name__}"
    if choices:
        return _type_text(choices[0])
    return kind.__name__


def _range_text(kind: Any) -> str:
    allowed = range_of(kind)
    return f", {allowed}" if isinstance(allowed, Range) else ""


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[]" if not value else str(list(value))
    return f'"{value}"' if isinstance(value, str) else str(value)


def _escape(text: str) -> str:
    return re.sub(r"(?<!\\)([|*<>])", r"\\\1", text)


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
