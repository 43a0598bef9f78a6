"""The processes of a run end soon after one of them was killed, and not when one has finished."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalodon_jax.parallel.liveness import LOST_PROCESS_EXIT_CODE, LivenessWatch

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import sys, time
import jax
from megalodon_jax.parallel.liveness import LivenessWatch
jax.distributed.initialize(sys.argv[1], 3, int(sys.argv[2]), cluster_detection_method="deactivate")
with LivenessWatch(seconds=6.0):
    print("watching", flush=True)
    time.sleep(float(sys.argv[3]))
print("left", flush=True)
"""


def start(*seconds: float) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(index), str(each)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index, each in enumerate(seconds)
    ]  # fmt: skip


@pytest.mark.slow
def test_the_others_end_after_one_was_killed():
    processes = start(120, 120, 120)
    for process in processes:
        assert process.stdout is not None
        while "watching" not in process.stdout.readline():
            assert process.poll() is None
    time.sleep(5)
    processes[2].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert time.monotonic() - killed < 30
    assert [process.returncode for process in processes[:2]] == [LOST_PROCESS_EXIT_CODE] * 2
    for output in outputs[:2]:
        assert "process 2 of the run gave no sign of life for 6 s" in output
        assert "start all processes again with --resume" in output


@pytest.mark.slow
def test_a_process_that_leaves_first_is_not_lost():
    processes = start(16, 3, 16)
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, outputs
    assert all("left" in output for output in outputs)


def test_a_single_process_needs_no_watch():
    with LivenessWatch(seconds=0.1) as watch:
        assert not watch._thread.is_alive()
