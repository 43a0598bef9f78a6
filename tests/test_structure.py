"""The layers of the packages: a module imports only from layers below its own; files stay short."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up; modules of one entry may import each other, without cycles.
LAYERS = [
    ("megalodon_jax.errors", "megalodon_jax.version", "megalodon_jax.lazy_names"),
    (
        "megalodon_jax.typing",
        "megalodon_jax.chips",
        "megalodon_jax.presets",
        "megalodon_jax.file_limits",
        "megalodon_jax.storage",
        "megalodon_jax.parameter_names",
    ),
    ("megalodon_jax.config",),
    ("megalodon_jax.flops", "megalodon_jax.compilation_cache"),
    ("megalodon_jax.parallel",),
    ("megalodon_jax.cache",),
    ("megalodon_jax.modules",),
    ("megalodon_jax.layer_variables",),
    ("megalodon_jax.layer_stack", "megalodon_jax.language_model", "megalodon_jax.loss"),
    ("megalodon_jax.encoder_model",),
    ("megalodon_jax.model", "megalodon_jax.encoder", "megalodon_jax.baselines"),
    (
        "megalodon_jax.models",
        "megalodon_jax.optimizer",
        "megalodon_jax.update_guard",
        "megalodon_jax.carried_state",
        "megalodon_jax.lora",
    ),
    ("megalodon_jax.train_state",),
    ("megalodon_jax.data",),
    ("megalodon_jax.inference",),
    ("megalodon_jax.checkpoints", "megalodon_jax.generate"),
    ("megalodon_jax.serve", "megalodon_jax.compiled"),
    ("megalodon_jax.evaluation",),
    ("megalodon_jax.interop", "megalodon_jax.pretrained"),
    ("megalodon_jax.tasks",),
    ("megalodon_jax.training",),
    ("megalodon_jax.bench", "megalodon_jax.plan", "megalodon_jax.study"),
    ("megalodon_jax.cli",),
    ("megalodon_jax.__main__",),
]
TORCH_MODEL = "megalodon_jax.interop.huggingface.torch_source.modeling_megalodon"
OPERATIONS = (
    "cema", "timestep_norm", "chunk_attention", "rowwise", "chunk_decode", "state_step",
    "norm_state_step", "skinny_matmul",
)  # fmt: skip
# The operations whose step a decoding kernel is, with which it shares types and coefficients.
SEQUENCE_OPERATIONS = {
    "chunk_decode": {"chunk_attention"},
    "state_step": {"cema"},
    "norm_state_step": {"state_step", "timestep_norm"},
}


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted names of all modules of the two packages."""
    found = {}
    for package in ("megalodon_jax", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports(name: str) -> frozenset[str]:
    """Modules of the two packages that a module imports when it is imported itself."""
    found = set()
    for node in _executed_on_import(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            found.add(node.module)
    return frozenset(found & modules().keys()) - {name}


def _executed_on_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        is_type_check = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_check:
            continue
        yield child
        yield from _executed_on_import(child)


def all_imports(name: str) -> set[str]:
    """Like `imports`, with those inside functions and for type checking."""
    tree = ast.parse(modules()[name].read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {module for module in found if module.split(".")[0] in ("megalodon_jax", "flax")}


def layer_of(name: str) -> int:
    top = ".".join(name.split(".")[:2])
    return next(i for i, layer in enumerate(LAYERS) if top in layer)


def test_every_module_has_a_layer():
    for name in modules():
        if name.startswith("megalodon_jax."):
            layer_of(name)


def test_a_module_imports_only_from_its_layer_and_below():
    upward = [
        f"{name} imports {target}"
        for name in modules()
        if name.startswith("megalodon_jax.")
        for target in all_imports(name)
        if target.startswith("megalodon_jax.") and layer_of(target) > layer_of(name)
    ]
    assert not upward


def test_kernels_import_neither_the_model_nor_flax():
    reaching_up = {
        name: found
        for name in modules()
        if name.startswith("pallas_kernels") and (found := all_imports(name))
    }
    assert not reaching_up


def test_operations_do_not_import_each_other():
    for name in modules():
        operation = name.split(".")[1] if name.startswith("pallas_kernels.") else None
        if operation in OPERATIONS:
            allowed = {operation} | SEQUENCE_OPERATIONS.get(operation, set())
            others = {f"pallas_kernels.{other}" for other in OPERATIONS if other not in allowed}
            assert not {i for i in imports(name) if ".".join(i.split(".")[:2]) in others}, name
        if operation == "common":
            assert all(i.startswith("pallas_kernels.common") for i in imports(name)), name


def test_there_is_no_import_cycle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        for target in sorted(imports(name)):
            # A package's __init__ runs before its modules, which import from each other.
            if not name.startswith(f"{target}."):
                visit(target, (*path, name))
        done.add(name)

    for name in modules():
        visit(name, ())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_the_same_files(operation: str):
    folder = ROOT / "pallas_kernels" / operation
    for file in ("api.py", "types.py", "reference.py", "xla.py", "README.md"):
        assert (folder / file).is_file(), file
    for backend in ("mosaic_gpu", "pallas_tpu"):
        if (folder / backend).is_dir():
            assert {"__init__.py", "op.py", "launch.py"} <= {
                p.name for p in (folder / backend).iterdir()
            }


def test_files_are_at_most_500_lines_long():
    sources = [*modules().values(), *(ROOT / "tests").rglob("*.py"), ROOT / "train.py"]
    # transformers loads a model's code as one file.
    sources.remove(modules()[TORCH_MODEL])
    long = {
        str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 500
    }
    assert not long
