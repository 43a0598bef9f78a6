"""Runs in a store as processes of their own: kills, signals, lost permission, a lost server."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.checkpoints import load_model, verify_run
from megalodon_jax.config import MeshConfig, ProcessesConfig, TrainConfig
from tests.faults.run_process import ROOT, started_run
from tests.storage.conftest import environment_of, free_port, running_server

pytestmark = pytest.mark.slow
# The step is slow enough for a signal between two of them, and heartbeats are frequent.
SLOW_STEPS = """
import time
from megalodon_jax.training.metrics import ProgressDisplay

advance = ProgressDisplay.advance

def advance_slowly(self, step):
    time.sleep(0.3)
    advance(self, step)

ProgressDisplay.advance = advance_slowly
"""


def params_of(run_dir: str, step: int):
    return nnx.split(load_model(run_dir, step=step).model, nnx.Param)[1]


@pytest.fixture
def run(config, store, compilation_cache_dir):
    """Starts the tiny run in the store."""

    def start(*options: str, name: str = "run", **settings):
        return started_run(
            config, compilation_cache_dir, "--run_dir", f"{store.url}/{name}", *options, **settings
        )

    return start


def is_complete(store, step: int) -> bool:
    """Whether the checkpoint has its manifest; step 0 has none."""
    return not step or f"run/checkpoints/{step}/manifest_0_of_1.txt" in store.names()


def test_a_killed_run_resumes_bit_for_bit(run, store):
    with run(name="whole", steps=9) as process:
        assert process.end(120)[0] == 0, process.output()
    # Before the first checkpoint, and after those of steps 3 and 6.
    for moment, options in (("step 2/9", ()), ("step 4/9", ()), ("step 7/9", ("--resume",))):
        with run(*options, changes=SLOW_STEPS, steps=9) as process:
            process.wait_for(moment)
            process.wait_for(lambda moment=moment: is_complete(store, int(moment[5]) // 3 * 3))
            process.send(signal.SIGKILL)
            process.end()
    with run("--resume", steps=9) as process:
        assert process.end(120)[0] == 0, process.output()
        assert "resumed at step 6" in process.output()
    url = store.url
    chex.assert_trees_all_equal(params_of(f"{url}/run", 9), params_of(f"{url}/whole", 9))
    assert {report.state for report in verify_run(f"{url}/run")} == {"good"}
    steps = [json.loads(line)["step"] for line in store.read("run/metrics.jsonl").splitlines()]
    assert set(steps) == set(range(1, 10))
    scratch = Path(os.environ.get("TMPDIR", "/tmp")).glob("megalodon_scratch_*")
    assert not [path for path in scratch if (path / "run" / "metrics.jsonl").exists()]


def test_a_second_run_is_refused(run):
    with run(changes=SLOW_STEPS, steps=200) as first:
        first.wait_for("step 2/200")
        with run(steps=200) as second:
            code, _ = second.end(60)
        assert code == 1
        assert f"is in use by pid {first.process.pid}" in second.output()
        first.send(signal.SIGTERM)
        code, seconds = first.end()
        assert code == 143, first.output()
        assert seconds < 15
        assert "SIGTERM: stopped after step" in first.output()


def test_a_run_without_permission_ends_soon(run, store):
    with run(changes=SLOW_STEPS, steps=200) as process:
        process.wait_for(lambda: is_complete(store, 3))
        store.refusal.touch()
        code, seconds = process.end()
        assert code == 1, process.output()
        assert seconds < 20
        output = process.output()
        assert "megalodon: error: checkpoint" in output or "cannot be copied" in output, output
        assert "Traceback" not in output
    store.refusal.unlink()
    with run("--resume", steps=6) as process:
        assert process.end(120)[0] == 0, process.output()


def test_a_bucket_that_may_not_be_written_ends_the_start(run, store):
    store.refusal.touch()
    with run() as process:
        code, _ = process.end(90)
    assert code == 1
    assert "cannot lock" in process.output()
    assert "Traceback" not in process.output()


def test_a_lost_server_ends_the_run(config, server, compilation_cache_dir, tmp_path):
    """It ends by an error after the client's retries; a second signal does not wait for them."""
    port = free_port()
    environment = environment_of(server.scheme, port)
    with (
        running_server(server.scheme, tmp_path, port) as lost,
        pytest.MonkeyPatch.context() as patch,
    ):
        if server.scheme == "s3":
            import boto3

            for name, value in environment.items():
                patch.setenv(name, value)
            boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"]).create_bucket(
                Bucket="bucket"
            )
        with started_run(
            config, compilation_cache_dir, "--run_dir", f"{server.scheme}://bucket/run",
            "--checkpoint_every", "20", changes=SLOW_STEPS, steps=2000, environment=environment,
        ) as process:  # fmt: skip
            process.wait_for("step 4/2000")
            lost.kill()
            lost.wait()
            process.wait_for("step 20/2000")
            process.send(signal.SIGTERM)
            time.sleep(2.0)
            process.send(signal.SIGTERM)
            code, seconds = process.end()
            assert code == 143, process.output()
            assert seconds < 5
            assert "no answer" in process.output() or "nothing saved" in process.output()


WORKER = """
import json, sys
from megalodon_jax.config import config_from_dict
from megalodon_jax.data import pipeline
from megalodon_jax.errors import MegalodonError
from megalodon_jax.training.loop import train

pipeline.PREFETCHED_TOKENS = 1 << 10
try:
    print("RESULT", train(config_from_dict(json.load(open(sys.argv[1])))).step)
except MegalodonError as error:
    print("ERROR", error)
"""


def run_two_processes(config: TrainConfig, folder: Path) -> list[str]:
    """Output of two processes with two devices each."""
    port = free_port()
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    started = []
    for index in range(2):
        own = dataclasses.replace(
            config,
            processes=ProcessesConfig(coordinator=f"127.0.0.1:{port}", count=2, index=index),
        )
        path = folder / f"{index}.json"
        path.write_text(json.dumps(dataclasses.asdict(own)))
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(path)],
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        return [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()


def test_two_processes_share_a_run_on_gs(stored, store, tmp_path):
    config = dataclasses.replace(
        stored, mesh=MeshConfig(data=4), sample_tokens=0,
        data=dataclasses.replace(stored.data, batch_size=4),
    )  # fmt: skip
    outputs = run_two_processes(config, tmp_path)
    if store.scheme == "s3":
        assert all("only runs of one process can write; use gs://" in text for text in outputs)
        assert store.names() == []
        return
    assert all("RESULT 6" in text for text in outputs), outputs
    assert "run/checkpoints/6/manifest_1_of_2.txt" in store.names()
    assert {report.state for report in verify_run(stored.run_dir)} == {"good"}
    longer = dataclasses.replace(config, resume=True, steps=8)
    outputs = run_two_processes(longer, tmp_path)
    assert all("RESULT 8" in text for text in outputs), outputs
    assert all(
        np.isfinite(leaf).all()
        for leaf in nnx.to_pure_dict(params_of(stored.run_dir, 8)).values()
        if hasattr(leaf, "shape")
    )
