"""Faults of checkpoints: corruption, storage that fails, and two owners of a run."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest

from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.checkpoints.lock import RunLock
from megalodon_jax.errors import CheckpointError, RunLockedError
from megalodon_jax.train_state import init_state
from tests.faults import corruptions
from tests.fixtures_runs import TINY_TABLES

ROOT = Path(__file__).resolve().parents[2]
# The long form: 400 corruptions, half of them flips of a bit.
COUNT = int(os.environ.get("MEGALODON_CORRUPTIONS", "20"))
SECONDS = 120


def test_no_corruption_is_restored_silently(config):
    counts, passed = corruptions.run(config, COUNT)
    assert sum(counts.values()) == COUNT
    assert len(counts) == 7
    assert not passed


@contextlib.contextmanager
def unwritable(directory: Path) -> Iterator[None]:
    """Makes a directory unwritable, also for root."""
    if os.geteuid():
        directory.chmod(0o555)
        yield
        directory.chmod(0o755)
        return
    command = shutil.which("chattr")
    if command is None or subprocess.run([command, "+i", str(directory)], check=False).returncode:
        pytest.skip("this file system has no immutable directories")
    yield
    subprocess.run([command, "-i", str(directory)], check=True)


@contextlib.contextmanager
def full(directory: Path) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fault", [unwritable, full])
def test_after_a_failed_save_no_thread_keeps_the_process_alive(config, fault):
    _, state = init_state(config)
    # Threads of other tests in this process.
    before = set(threading.enumerate())
    checkpoints = RunCheckpoints(config.run_dir)

    def save(step: int) -> None:
        checkpoints.save(
            state._replace(step=jnp.asarray(step, jnp.int32)),
            loader_state={}, config=config, tokenizer_fingerprint="bytes",
        )  # fmt: skip
        checkpoints.wait()

    save(1)
    start = time.monotonic()
    with fault(checkpoints.directory):
        with pytest.raises(CheckpointError, match=r"/2 was not written: .*(usable|no other)"):
            save(2)
        checkpoints.close()

    def writers() -> list[str]:
        new = (each for each in set(threading.enumerate()) - before if not each.daemon)
        # Idle workers of an executor end with the interpreter.
        return [each.name for each in new if not each.name.startswith("metadata_store")]

    # The writers of the other items end on their own, soon.
    while writers() and time.monotonic() - start < 5:
        time.sleep(0.05)
    assert time.monotonic() - start < 5
    assert not writers()


def test_a_removed_run_directory_ends_the_run(config):
    _, state = init_state(config)
    checkpoints = RunCheckpoints(config.run_dir)
    shutil.rmtree(config.run_dir)
    with pytest.raises(RunLockedError, match=r"lock of .* was removed"):
        checkpoints.save(state, loader_state={}, config=config, tokenizer_fingerprint="bytes")
    checkpoints.close()
    assert not Path(config.run_dir).exists()


CONFIG = (
    """
run_dir = "{run_dir}"
steps = {steps}
log_every = 1
eval_every = 0
checkpoint_every = 3
final_eval_batches = 1
sample_tokens = 0
loss_chunk_size = 64
"""
    + TINY_TABLES
)


class Command:
    """`megalodon train` in a process of its own."""

    def __init__(self, folder: Path, text_file: Path, *, steps: int) -> None:
        self.run_dir = folder / "run"
        self.path = folder / "config.toml"
        self.path.write_text(
            CONFIG.format(run_dir=self.run_dir, text_file=text_file, steps=steps, lr=1e-2)
        )
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *options: str) -> subprocess.Popen[str]:
        self.started.append(
            subprocess.Popen(
                [sys.executable, "-m", "megalodon_jax", "train", str(self.path), *options],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        )  # fmt: skip
        return self.started[-1]

    def wait_for_checkpoint(self) -> None:
        deadline = time.monotonic() + SECONDS
        while not list(self.run_dir.glob("checkpoints/*/manifest_*")):
            assert time.monotonic() < deadline
            assert self.started[0].poll() is None, self.started[0].communicate()
            time.sleep(0.05)

    def kill(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()


@pytest.fixture
def command(tmp_path, text_file) -> Iterator[Callable[..., Command]]:
    made = []

    def make(*, steps: int) -> Command:
        made.append(Command(tmp_path, text_file, steps=steps))
        return made[-1]

    yield make
    for entry in made:
        entry.kill()


@pytest.mark.slow
def test_two_runs_in_one_directory(command):
    command = command(steps=100_000)
    first = command.start()
    command.wait_for_checkpoint()
    for options in ((), ("--resume",)):
        second = command.start(*options)
        _, errors = second.communicate(timeout=SECONDS)
        assert second.returncode == 1
        assert f"is in use by pid {first.pid} on host" in errors
        assert "Traceback" not in errors
    assert first.poll() is None
    first.kill()
    # A killed owner on the same machine is replaced at once.
    third = command.start("--resume")
    assert third.stdout is not None
    start = time.monotonic()
    line = next(line for line in third.stdout if "verified" in line or "resumed" in line)
    assert "checkpoint of step" in line
    assert time.monotonic() - start < 30
    # It saves at SIGTERM, so that nothing was damaged.
    third.send_signal(signal.SIGTERM)
    third.communicate(timeout=SECONDS)
    with RunCheckpoints(command.run_dir, read_only=True) as checkpoints:
        checkpoints.verify(checkpoints.steps()[-1])


@pytest.mark.slow
def test_the_process_ends_within_ten_seconds_after_a_failed_save(command):
    command = command(steps=100_000)
    process = command.start()
    command.wait_for_checkpoint()
    with unwritable(command.run_dir / "checkpoints"):
        start = time.monotonic()
        _, errors = process.communicate(timeout=SECONDS)
        assert time.monotonic() - start < 10
    assert process.returncode == 1
    assert "was not written" in errors


# Arguments: coordinator, process, configuration. Process 1 cannot write its second checkpoint.
WORKER = """
import json, resource, sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.checkpoints.lock import RunLock
from megalodon_jax.config import config_from_dict
from megalodon_jax.errors import MegalodonError
from megalodon_jax.parallel.distributed import exit_without_barrier
from megalodon_jax.train_state import init_state

address, index, path = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
config = config_from_dict(json.load(open(path)))
_, state = init_state(config)

def save(checkpoints, step):
    array = jax.make_array_from_callback((), state.step.sharding, lambda _: np.int32(step))
    checkpoints.save(
        state._replace(step=array), loader_state={}, config=config, tokenizer_fingerprint="bytes"
    )
    checkpoints.wait()

try:
    with RunCheckpoints(config.run_dir) as checkpoints:
        save(checkpoints, 1)
        if index == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        multihost_utils.sync_global_devices("limited")
        print("saving", flush=True)
        save(checkpoints, 2)
except MegalodonError as error:
    print(error, flush=True)
    exit_without_barrier(1)
"""


@pytest.fixture
def two_workers(config, tmp_path) -> Iterator[list[subprocess.Popen[str]]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    settings = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=2))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(settings)))
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(index), str(path)],
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    yield workers
    for worker in workers:
        worker.kill()
        worker.communicate()


@pytest.mark.slow
def test_two_processes_end_within_ten_seconds_after_a_save_failed_in_one(config, two_workers):
    for worker in two_workers:
        assert worker.stdout is not None
        assert any(line == "saving\n" for line in worker.stdout)
    start = time.monotonic()
    outputs = [worker.communicate(timeout=SECONDS)[0] for worker in two_workers]
    assert time.monotonic() - start < 10
    assert [worker.returncode for worker in two_workers] == [1, 1]
    assert "process 1 of the run failed: checkpoint of step 2 was not written" in outputs[0]
    assert "checkpoints/2 was not written" in outputs[1]
    with RunCheckpoints(config.run_dir, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.verify(1)


@pytest.mark.slow
def test_two_processes_are_refused_together(config, request):
    with RunLock(config.run_dir):
        outputs = [
            worker.communicate(timeout=SECONDS)[0]
            for worker in request.getfixturevalue("two_workers")
        ]
        assert all(f"is in use by pid {os.getpid()} on host" in output for output in outputs)
        assert [path.name for path in Path(config.run_dir).iterdir()] == [".lock"]
