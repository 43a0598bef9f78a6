"""Training by two processes against training by one: the same losses, weights, checkpoints."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ProcessesConfig,
    TrainConfig,
)
from megalodon_jax.training.checkpoint import RunCheckpoints, load_model

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 150
# Runs one after another in the same processes. A run named `stopped` gets a signal in one of them.
WORKER = """
import json, signal, sys
import jax
from megalodon_jax.config import config_from_dict
from megalodon_jax.data import pipeline
from megalodon_jax.training.loop import train
from megalodon_jax.training.metrics import ProgressDisplay

pipeline.READY_TOKENS = 1 << 10
advance = ProgressDisplay.advance

def advance_and_stop(self, step):
    advance(self, step)
    if step == 2 and jax.process_index() == jax.process_count() - 1:
        signal.raise_signal(signal.SIGTERM)

for path in sys.argv[1:]:
    config = config_from_dict(json.load(open(path)))
    stops = "stopped" in config.run_dir and not config.resume
    ProgressDisplay.advance = advance_and_stop if stops else advance
    result = train(config)
    print("RESULT", json.dumps([result.step, result.stop_signal, result.train_loss, result.sample]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Directories of finished runs; named for the processes, then for what they did."""
    root = tmp_path_factory.mktemp("runs")
    text = root / "corpus.txt"
    text.write_text("\0".join(f"document {i}: " + "ab c" * (50 * (i % 11 + 1)) for i in range(40)))
    one = _Launcher(root, text, num_processes=1)
    two = _Launcher(root, text, num_processes=2)
    one.run(one.config("one", num_shards=2), one.config("one_chunk", chunk=4, data=1, steps=2))
    _copy_first_checkpoint(root / "one", root / "one_then_two")
    two.run(
        two.config("two"),
        two.config("two_chunk", chunk=4, data=1, steps=2),
        two.config("one_then_two", resume=True),
        two.config("stopped"),
    )
    _copy_first_checkpoint(root / "two", root / "two_then_one")
    one.run(one.config("two_then_one", resume=True), one.config("stopped", resume=True))
    return root


class _Launcher:
    """Starts the worker in one or two processes that have four devices together."""

    def __init__(self, root: Path, text: Path, *, num_processes: int) -> None:
        self.root, self.text, self.num_processes = root, text, num_processes

    def config(
        self, name: str, *, data: int = 2, chunk: int = 2, num_shards: int = 0, steps: int = 6,
        resume: bool = False,
    ) -> TrainConfig:  # fmt: skip
        return TrainConfig(
            model=ModelConfig(
                cema_implementation="reference", timestep_norm_implementation="reference",
                attention_implementation="reference", num_layers=1, model_dim=8, z_dim=4,
                value_dim=8, num_heads=1, ffn_hidden_dim=8, cema_ndim=2, chunk_size=16,
                vocab_size=257, norm_num_groups=2,
            ),
            data=DataConfig(
                source="files", files=(str(self.text),), document_separator="\0", seq_len=64,
                batch_size=4, heldout_fraction=0.2, num_shards=num_shards,
            ),
            mesh=MeshConfig(data=data, chunk=chunk), optim=OptimConfig(lr=1e-2, warmup_steps=2),
            run_dir=str(self.root / name), steps=steps, log_every=1, eval_every=0,
            checkpoint_every=3, final_eval_batches=2, sample_tokens=4 if data == 2 else 0,
            loss_chunk_size=64, resume=resume,
        )  # fmt: skip

    def run(self, *configs: TrainConfig) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        workers = []
        for index in range(self.num_processes):
            paths = []
            for number, config in enumerate(configs):
                if self.num_processes > 1:
                    processes = ProcessesConfig(
                        coordinator=address, count=self.num_processes, index=index
                    )
                    config = dataclasses.replace(config, processes=processes)
                paths.append(self.root / f"config_{self.num_processes}_{index}_{number}.json")
                paths[-1].write_text(json.dumps(dataclasses.asdict(config)))
            workers.append(self._start(paths))
        outputs = _finish(workers)
        for index, output in enumerate(outputs):
            results = [line for line in output.splitlines() if line.startswith("RESULT ")]
            for config, line in zip(configs, results, strict=True):
                name = f"{Path(config.run_dir).name}_{self.num_processes}_{index}"
                Path(self.root, f"{name}.result").write_text(line.removeprefix("RESULT "))
                Path(self.root, f"{name}.output").write_text(output)

    def _start(self, paths: list[Path]) -> subprocess.Popen[str]:
        flags = (
            "--xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={4 // self.num_processes}"
        )
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, paths)],
            env={
                **os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def _finish(workers: list[subprocess.Popen[str]]) -> list[str]:
    try:
        outputs = [worker.communicate(timeout=SECONDS)[0] for worker in workers]
    except subprocess.TimeoutExpired:
        for worker in workers:
            worker.kill()
        ends = [worker.communicate()[0][-3000:] for worker in workers]
        pytest.fail(f"no end after {SECONDS} s: " + "\n---\n".join(ends))
    assert [worker.returncode for worker in workers] == [0] * len(workers), "\n---\n".join(outputs)
    return outputs


def _copy_first_checkpoint(source: Path, target: Path) -> None:
    shutil.copytree(source / "checkpoints" / "3", target / "checkpoints" / "3")


def _lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _assert_same_numbers(run: Path, due: Path, *, after: int = 0) -> None:
    mine, expected = _lines(run), [line for line in _lines(due) if line["step"] > after]
    assert [line["step"] for line in mine] == [line["step"] for line in expected]
    for line, other in zip(mine, expected, strict=True):
        for name in ("loss", "grad_norm", "tokens", "heldout_loss", "heldout_bits_per_byte"):
            assert line.get(name) == pytest.approx(other.get(name), rel=1e-6), (line, name)


def _assert_same_weights(run: Path, due: Path, *, step: int = 6) -> None:
    mine, other = (
        jax.tree.leaves(nnx.split(load_model(path, step=step).model)[1]) for path in (run, due)
    )
    for a, b in zip(mine, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _result(runs: Path, name: str) -> list:
    return json.loads((runs / f"{name}.result").read_text())


def _steps(run: Path) -> list[int]:
    with RunCheckpoints(run, read_only=True) as checkpoints:
        return checkpoints.steps()


@pytest.mark.slow
def test_two_processes_train_as_one(runs):
    _assert_same_numbers(runs / "two", runs / "one")
    _assert_same_weights(runs / "two", runs / "one")
    assert _steps(runs / "two") == [3, 6]


@pytest.mark.slow
def test_sequences_split_over_two_processes_train_as_in_one(runs):
    _assert_same_numbers(runs / "two_chunk", runs / "one_chunk")
    _assert_same_weights(runs / "two_chunk", runs / "one_chunk", step=2)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_goes_on_in_two_and_the_reverse(runs):
    for name in ("one_then_two", "two_then_one"):
        _assert_same_numbers(runs / name, runs / "one", after=3)
        _assert_same_weights(runs / name, runs / "one")


@pytest.mark.slow
def test_one_process_logs(runs):
    steps = [line["step"] for line in _lines(runs / "two") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(list((runs / "two" / "tensorboard").iterdir())) == 1
    first, second = (runs / f"two_2_{index}.output" for index in range(2))
    assert "4 x cpu of 2 processes" in first.read_text()
    said = [line for line in second.read_text().splitlines() if line.startswith("step ")]
    assert said == []
    assert _result(runs, "two_2_0") == _result(runs, "two_2_1")
    assert len(_result(runs, "two_2_0")[-1]) > 0


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_a_checkpoint(runs):
    results = [_result(runs, f"stopped_2_{index}") for index in range(2)]
    assert results[0] == results[1]
    step, number, _, sample = results[0]
    assert 2 <= step < 6
    assert number == 15
    assert sample == ""
    # A process went on from that checkpoint.
    assert step in [*_steps(runs / "stopped"), *range(3, 4)]
    _assert_same_weights(runs / "stopped", runs / "one")
