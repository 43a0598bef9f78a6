"""Settings for all tests; read before JAX starts."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

# Tracing allocates many long-lived objects: rarer garbage collection saves 5% of the time.
gc.set_threshold(100_000, 50, 100)

# Compilation is most of the suite's time, and LLVM's optimizer triples it. A test that needs full
# optimization asks for it (`compiler_options`).
# Eight virtual CPU devices form the meshes; a computation without a device runs on the first one.
# XLA aborts the process when a device's thread is 60 s late for a collective, which happens to a
# starved test on a busy machine; this allows 320 s.
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=300"
)
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}"

# Ahead-of-time compilers (tests/topologies.py) come with backends that JAX would try to start.
# On a GPU run the tests with JAX_PLATFORMS=cuda.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Runs keep compiled programs in the user's cache: here in a folder that ends with the tests.
_USER_CACHE = tempfile.TemporaryDirectory(prefix="cache_")
os.environ["XDG_CACHE_HOME"] = _USER_CACHE.name

# Imported after the environment is set, because it imports JAX.
pytest_plugins = ["tests.fixtures_runs"]

# Every compiled program has about seven memory maps, of which Linux allows a process 65,530: beyond
# them XLA ends with a segmentation fault. Fewer programs also make garbage collection faster.
_MAX_MEMORY_MAPS = 8_000


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs():
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MAX_MEMORY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Runs a file in one worker if there are few: its compiled functions are then shared."""
    from tests.file_scheduling import FileScheduling

    return FileScheduling(config, log) if len(config.option.tx) <= 4 else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks slow variants and those that CI leaves out, before tests are chosen by their marks."""
    from tests.variants import CI_VARIANTS, LEFT_OUT, SLOW_VARIANTS

    found: dict[str, list[str]] = {}
    for item in items:
        name, _, variant = item.nodeid.removeprefix("tests/").partition("[")
        variant = variant.removesuffix("]")
        if name not in CI_VARIANTS | LEFT_OUT | SLOW_VARIANTS:
            continue
        found.setdefault(name, []).append(variant)
        if variant in SLOW_VARIANTS.get(name, ()):
            item.add_marker("slow")
        if variant not in CI_VARIANTS.get(name, (variant,)) or variant in LEFT_OUT.get(name, ()):
            item.add_marker("slow")
            item.add_marker("exhaustive")
    for name, variants in found.items():
        # One variant alone was named on the command line.
        tables = (CI_VARIANTS, LEFT_OUT, SLOW_VARIANTS)
        missing = {variant for table in tables for variant in table.get(name, ())} - {*variants}
        if missing and len(variants) > 1:
            raise pytest.UsageError(f"tests/variants.py: {name} has no variant {min(missing)!r}")
