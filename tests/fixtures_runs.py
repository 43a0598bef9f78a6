"""Fixtures of a tiny training run, shared by the tests of training, checkpoints and commands."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from megalodon_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

# The reference implementations compile fastest; each operation's own tests compare the others.
TINY_MODEL = ModelConfig(
    cema_implementation="reference",
    timestep_norm_implementation="reference",
    attention_implementation="reference",
    num_layers=1, model_dim=8, z_dim=4, value_dim=8, num_heads=1, ffn_hidden_dim=8, cema_ndim=2,
    chunk_size=16, vocab_size=257, norm_num_groups=2,
)  # fmt: skip

# The tables of the same run in TOML, for processes of their own; the settings of the run go before.
TINY_TABLES = """
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
lr = {lr}
warmup_steps = 2
"""


@pytest.fixture(scope="session")
def compilation_cache_dir(tmp_path_factory) -> str:
    """A directory of compiled programs, which the workers of pytest-xdist share."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return str(tmp_path_factory.mktemp("compiled"))
    # Every worker has a folder of its own in that of the session.
    shared = tmp_path_factory.getbasetemp().parent / "compiled"
    shared.mkdir(exist_ok=True)
    return str(shared)


@pytest.fixture(scope="module")
def shared_compilation(compilation_cache_dir):
    """Compiles without optimization into one cache: every tiny run has the same programs."""
    changed = {
        "jax_compilation_cache_dir": compilation_cache_dir,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in changed}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", compilation_cache_dir)
        for name, value in changed.items():
            jax.config.update(name, value)
        # This setting cannot be read; its default is False.
        jax.config.update("jax_disable_most_optimizations", True)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_disable_most_optimizations", False)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def short_prefetch():
    """Prefetches a thousand tokens: runs of a few tiny batches do not need a million."""
    from megalodon_jax.data import pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "PREFETCHED_TOKENS", 1 << 10)
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Forty documents of 200 to 2,200 bytes, separated by NUL."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\0".join(f"document {i}: " + "ab c" * (50 * (i % 11 + 1)) for i in range(40)))
    return path


@pytest.fixture(scope="session")
def session_config(text_file) -> TrainConfig:
    return TrainConfig(
        model=TINY_MODEL,
        data=DataConfig(
            source="files", files=(str(text_file),), document_separator="\0", seq_len=32,
            batch_size=2, heldout_fraction=0.2,
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        steps=6, log_every=1, eval_every=0, checkpoint_every=3, final_eval_batches=2,
        sample_tokens=4, loss_chunk_size=64,
    )  # fmt: skip


@pytest.fixture
def config(session_config, tmp_path) -> TrainConfig:
    """The tiny run, in a directory of its own."""
    return dataclasses.replace(session_config, run_dir=str(tmp_path / "run"))


@pytest.fixture(scope="session")
def finished_runs() -> dict[str, TrainConfig]:
    """The runs of `trained_run`: session-wide, but trained under `shared_compilation`."""
    return {}


@pytest.fixture
def trained_run(
    shared_compilation, short_prefetch, session_config, finished_runs, tmp_path_factory
) -> TrainConfig:
    """The tiny run after its last step; read only."""
    from megalodon_jax.training.loop import train

    if "tiny" not in finished_runs:
        run_dir = tmp_path_factory.mktemp("trained") / "run"
        config = dataclasses.replace(session_config, run_dir=str(run_dir))
        train(config)
        finished_runs["tiny"] = config
    return finished_runs["tiny"]


@pytest.fixture
def finished(trained_run, tmp_path) -> TrainConfig:
    """A copy of the finished run that a test may change."""
    shutil.copytree(trained_run.run_dir, tmp_path / "copy")
    return dataclasses.replace(trained_run, run_dir=str(tmp_path / "copy"))
