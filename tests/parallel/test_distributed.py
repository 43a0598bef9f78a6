"""Training with two processes against one: the same losses, weights and checkpoints."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.checkpoints import RunCheckpoints, load_model
from megalodon_jax.compiled.topologies import has_tpu_compiler, tpu_devices
from megalodon_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ProcessesConfig,
    TrainConfig,
)
from megalodon_jax.errors import ConfigError
from megalodon_jax.parallel import distributed
from megalodon_jax.parallel.distributed import (
    DelayedGlobalMax,
    all_gather_json,
    exit_without_barrier,
    initialize,
    is_multi_process_environment,
    num_shards_of,
    place_batch,
    rows_of_process,
    rows_of_processes,
)
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.parallel.sharding import batch_sharding
from megalodon_jax.typing import Batch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
# Trains several runs in the same processes. A run named `stopped` gets a signal in one process.
WORKER = """
import json, signal, sys
import jax
from megalodon_jax.config import config_from_dict
from megalodon_jax.data import pipeline
from megalodon_jax.training.loop import train
from megalodon_jax.training.metrics import ProgressDisplay

pipeline.PREFETCHED_TOKENS = 1 << 10
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


def finished_runs(root: Path) -> Path:
    """Directories of finished runs, named after their processes and what they did."""
    text = root / "corpus.txt"
    text.write_text("\0".join(f"document {i}: " + "ab c" * (50 * (i % 11 + 1)) for i in range(40)))
    one = _Launcher(root, text, num_processes=1)
    two = _Launcher(root, text, num_processes=2)
    init_from = str(root / "one")
    one.run(
        one.config("one", num_shards=2),
        one.config("one_chunk", chunk=4, init_from=init_from),
        one.config("one_carry", chunk=1, num_shards=2, carry_state=True),
    )
    _copy_first_checkpoint(root / "one", root / "one_then_two")
    shutil.copytree(root / "one" / "checkpoints" / "6", root / "one_then_two" / "checkpoints" / "6")
    shutil.rmtree(root / "one_then_two" / "checkpoints" / "6" / "opt_state")
    two.run(
        two.config("two", sample_tokens=4),
        two.config("one_then_two", resume=True),
        two.config("stopped_chunk", chunk=4, init_from=init_from),
        two.config("two_carry", chunk=1, carry_state=True),
    )
    _copy_first_checkpoint(root / "two", root / "two_then_one")
    _copy_first_checkpoint(root / "two_carry", root / "carry_then_one")
    shutil.copytree(root / "stopped_chunk", root / "stopped")
    one.run(
        one.config("two_then_one", resume=True),
        one.config("carry_then_one", chunk=1, carry_state=True, resume=True),
        one.config("stopped_chunk", chunk=4, resume=True),
    )
    return root


class _Launcher:
    """Starts the worker in one or two processes with four devices in total."""

    def __init__(self, root: Path, text: Path, *, num_processes: int) -> None:
        self.root, self.text, self.num_processes = root, text, num_processes

    def config(
        self, name: str, *, chunk: int = 2, num_shards: int = 0, carry_state: bool = False,
        **settings: Any,
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
                carry_state=carry_state,
            ),
            mesh=MeshConfig(data=4 // chunk, chunk=chunk),
            optim=OptimConfig(lr=1e-2, warmup_steps=2),
            run_dir=str(self.root / name), steps=6, log_every=1, eval_every=0, checkpoint_every=3,
            final_eval_batches=2, loss_chunk_size=64, **{"sample_tokens": 0, **settings},
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
                "JAX_COMPILATION_CACHE_DIR": str(self.root / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def _finish(workers: list[subprocess.Popen[str]]) -> list[str]:
    try:
        outputs = [worker.communicate(timeout=SECONDS)[0] for worker in workers]
    except subprocess.TimeoutExpired:
        for worker in workers:
            worker.kill()
        tails = [worker.communicate()[0][-3000:] for worker in workers]
        pytest.fail(f"no result after {SECONDS} s: " + "\n---\n".join(tails))
    assert [worker.returncode for worker in workers] == [0] * len(workers), "\n---\n".join(outputs)
    return outputs


def _copy_first_checkpoint(source: Path, target: Path) -> None:
    shutil.copytree(source / "checkpoints" / "3", target / "checkpoints" / "3")


def _lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _assert_same_metrics(run: Path, reference: Path, *, after: int = 0) -> None:
    lines = _lines(run)
    expected = [line for line in _lines(reference) if line["step"] > after]
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() - {"tokens_per_second"} == other.keys() - {"tokens_per_second"}
        for name in line.keys() & {"loss", "grad_norm", "tokens", "heldout_loss"}:
            assert line[name] == pytest.approx(other[name], rel=1e-6), (line["step"], name)


def _assert_same_weights(run: Path, reference: Path, *, step: int = 6) -> None:
    weights = (
        jax.tree.leaves(nnx.split(load_model(path, step=step).model)[1])
        for path in (run, reference)
    )
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _result(runs: Path, name: str) -> list:
    return json.loads((runs / f"{name}.result").read_text())


def _steps(run: Path) -> list[int]:
    with RunCheckpoints(run, read_only=True) as checkpoints:
        return checkpoints.steps()


def check_two_processes_train_as_one(runs: Path) -> None:
    _assert_same_metrics(runs / "two", runs / "one")
    _assert_same_weights(runs / "two", runs / "one")
    assert _steps(runs / "two") == [3, 6]


def check_checkpoints_resume_with_another_number_of_processes(runs: Path) -> None:
    for name in ("one_then_two", "two_then_one"):
        _assert_same_metrics(runs / name, runs / "one", after=3)
        _assert_same_weights(runs / name, runs / "one")


def check_rows_of_two_processes_continue_each_other_as_in_one(runs: Path) -> None:
    for name, after in (("two_carry", 0), ("carry_then_one", 3)):
        _assert_same_metrics(runs / name, runs / "one_carry", after=after)
        _assert_same_weights(runs / name, runs / "one_carry")
    assert _lines(runs / "carry_then_one")[0]["carried_tokens"] > 0.5


def check_only_process_0_logs(runs: Path) -> None:
    steps = [line["step"] for line in _lines(runs / "two") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(list((runs / "two" / "tensorboard").iterdir())) == 1
    first, second = (runs / f"two_2_{index}.output" for index in range(2))
    assert "4 x cpu of 2 processes" in first.read_text()
    assert not [line for line in second.read_text().splitlines() if line.startswith("step ")]
    assert _result(runs, "two_2_0") == _result(runs, "two_2_1")
    assert len(_result(runs, "two_2_0")[-1]) > 0


def check_both_processes_skip_a_damaged_checkpoint(runs: Path) -> None:
    assert _steps(runs / "one_then_two") == [3, 6]
    assert Path(runs, "one_then_two", "checkpoints", "damaged_6", "params").is_dir()
    for index in range(2):
        assert "checkpoints/6" in (runs / f"one_then_two_2_{index}.output").read_text()


def check_a_signal_to_one_process_stops_both(runs: Path) -> None:
    results = [_result(runs, f"stopped_chunk_2_{index}") for index in range(2)]
    assert results[0] == results[1]
    step, number, _, sample = results[0]
    assert 2 <= step <= 4
    assert number == signal.SIGTERM
    assert sample == ""
    assert _steps(runs / "stopped")[-1] == step


def check_context_parallelism_over_two_processes_trains_as_in_one(runs: Path) -> None:
    # Two processes ran the first steps with all rows in both; one process resumed.
    _assert_same_metrics(runs / "stopped_chunk", runs / "one_chunk")
    _assert_same_weights(runs / "stopped_chunk", runs / "one_chunk")


@pytest.mark.slow
def test_two_processes(tmp_path):
    # A single test: with pytest-xdist every worker would start these processes again.
    runs = finished_runs(tmp_path)
    check_two_processes_train_as_one(runs)
    check_checkpoints_resume_with_another_number_of_processes(runs)
    check_rows_of_two_processes_continue_each_other_as_in_one(runs)
    check_only_process_0_logs(runs)
    check_both_processes_skip_a_damaged_checkpoint(runs)
    check_a_signal_to_one_process_stops_both(runs)
    check_context_parallelism_over_two_processes_trains_as_in_one(runs)


def _assign_rows(monkeypatch, *rows: tuple[int, int, int]) -> None:
    """Simulates devices of several processes: (process, first row, row after the last)."""
    rows_by_device = {
        _Device(process): (slice(start, stop), slice(None)) for process, start, stop in rows
    }
    sharding = SimpleNamespace(devices_indices_map=lambda shape: rows_by_device)
    monkeypatch.setattr(distributed, "batch_sharding", lambda mesh: sharding)


class _Device:
    def __init__(self, process_index: int) -> None:
        self.process_index = process_index


def test_rows_of_processes(monkeypatch):
    mesh = make_mesh(MeshConfig(data=2, chunk=2, model=2))
    assert rows_of_process(mesh, 4) == (0, 1, 2, 3)
    assert num_shards_of(mesh, 4) == 1
    _assign_rows(monkeypatch, (1, 4, 6), (0, 0, 2), (0, 2, 4), (1, 6, 8))
    assert rows_of_processes(mesh, 8) == {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}
    assert num_shards_of(mesh, 8) == 2
    # Processes that share an axis of the sequence or of features load the same rows.
    _assign_rows(monkeypatch, (0, 0, 4), (1, 0, 4), (2, 4, 8), (3, 4, 8))
    assert rows_of_processes(mesh, 8)[1] == (0, 1, 2, 3)
    assert num_shards_of(mesh, 8) == 2
    _assign_rows(monkeypatch, (0, 0, 2), (1, 2, 4), (1, 4, 6), (0, 6, 8))
    assert rows_of_processes(mesh, 8) == {0: (0, 1, 6, 7), 1: (2, 3, 4, 5)}
    assert num_shards_of(mesh, 8) == 4
    _assign_rows(monkeypatch, (1, 0, 8))
    with pytest.raises(ConfigError, match="none of process 0; set one axis"):
        rows_of_process(mesh, 8)


@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4"])
@pytest.mark.parametrize(
    "sizes", [{"data": 16}, {"data": 4, "chunk": 4}, {"data": 2, "model": 8}, {"chunk": 16}]
)
def test_rows_on_a_pod_of_four_hosts(topology, sizes):
    if not has_tpu_compiler():
        pytest.skip("libtpu is not installed")
    mesh = make_mesh(MeshConfig(**sizes), tpu_devices(topology))
    rows = rows_of_processes(mesh, 32)
    assert len(rows) == 4
    assert {row for held in rows.values() for row in held} == {*range(32)}
    # A process has all rows of its data shards.
    rows_per_shard = 32 // num_shards_of(mesh, 32)
    for held in rows.values():
        assert len(held) == rows_per_shard * len({row // rows_per_shard for row in held})


def test_a_device_gets_its_rows_of_those_of_its_process(monkeypatch):
    shards = {}

    def make_array(shape, sharding, shard):
        for rows in (slice(0, 2), slice(6, 8)):
            shards[rows.start] = shard((slice(None), rows, slice(2, 4)))
        return shards

    monkeypatch.setattr(jax, "make_array_from_callback", make_array)
    whole = np.arange(8 * 4).reshape(1, 8, 4)
    rows = [0, 1, 6, 7]
    batch = Batch(*[whole[:, rows]] * 4)
    place_batch(batch, make_mesh(MeshConfig()), rows=rows, batch_size=8)
    np.testing.assert_array_equal(shards[0], whole[:, 0:2, 2:4])
    np.testing.assert_array_equal(shards[6], whole[:, 6:8, 2:4])


def test_a_placed_batch_equals_the_batch():
    mesh = make_mesh(MeshConfig(data=2, chunk=2, model=2))
    tokens = np.arange(2 * 4 * 6, dtype=np.int32).reshape(2, 4, 6)
    batch = Batch(tokens, tokens + 1, tokens + 2, tokens.astype(np.float32))
    placed = place_batch(batch, mesh, rows=range(4), batch_size=4)
    for array, expected in zip(placed, batch, strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.sharding == batch_sharding(mesh, leading=1)
        assert {shard.data.shape for shard in array.addressable_shards} == {(2, 2, 3)}


def test_a_single_process_exchanges_nothing():
    assert all_gather_json({"a": [1]}) == [{"a": [1]}]
    maximum = DelayedGlobalMax(make_mesh(MeshConfig()))
    assert [maximum.exchange(number) for number in (0, 15, 0)] == [0, 15, 0]


SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        (SLURM, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        # A batch script without srun.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a", "TPU_WORKER_HOSTNAMES": "a"}, True),
    ],
)
def test_multi_process_environments(environment, expected):
    assert is_multi_process_environment({"TPU_SKIP_MDS_QUERY": "1", **environment}) is expected


def test_a_tpu_without_variables_queries_its_metadata(monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    for hosts, expected in (("a,b", True), ("a", False), ("", False)):
        monkeypatch.setattr(distributed, "_tpu_hosts", lambda hosts=hosts: hosts)
        assert is_multi_process_environment({}) is expected
        assert not is_multi_process_environment({"JAX_PLATFORMS": "cpu"})


def test_processes_are_initialized_from_config_or_environment(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    initialize(ProcessesConfig(detect=False))
    assert calls == []
    initialize(ProcessesConfig())
    initialize(ProcessesConfig(coordinator="host:1234", count=3, index=2))
    assert calls == [(), ("host:1234", 3, 2)]
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    initialize(ProcessesConfig())
    assert len(calls) == 2


def test_after_an_error_a_process_exits_without_barrier(monkeypatch):
    registered = []
    monkeypatch.setattr(distributed.atexit, "register", registered.append)
    exit_without_barrier(1)
    assert registered == []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    exit_without_barrier(2)
    codes = []
    monkeypatch.setattr(distributed.os, "_exit", codes.append)
    registered[0]()
    assert codes == [2]


def test_failed_initialization_is_an_error():
    # Initialization fails because this process has already used its devices.
    jax.devices()
    with pytest.raises(ConfigError, match=r"cannot join the other processes: .*processes\.detect"):
        initialize(ProcessesConfig(coordinator="localhost:1", count=2, index=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "host:1"}, "count 0, index -1; set all three or none"),
        ({"count": 2, "index": 0}, "coordinator is '', count 2, index 0; set all three"),
        ({"coordinator": "host:1", "count": 2, "index": 2}, "index is 2; with count 2 use 0 to 1"),
        ({"coordinator": "host", "count": 2, "index": 0}, "is 'host'; use \"host:port\""),
    ],
)
def test_process_settings_are_complete_or_absent(settings, message):
    with pytest.raises(ConfigError, match=message):
        ProcessesConfig(**settings)
