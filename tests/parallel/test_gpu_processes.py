"""One process for each GPU of a host against one process for all, and the loss of a process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS, CHECKPOINT_EVERY = 2000, 500
# Seconds after which the other processes must have ended when one was killed.
NOTICED_IN = 30
SETTINGS = f"""
steps = {STEPS}
eval_every = 0
checkpoint_every = {CHECKPOINT_EVERY}
log_every = 50
sample_tokens = 0
[model]
num_layers = 2
model_dim = 256
z_dim = 64
value_dim = 512
num_heads = 1
ffn_hidden_dim = 512
chunk_size = 512
norm_num_groups = 8
vocab_size = 257
dtype = "bfloat16"
[data]
document_separator = "\\u0000"
seq_len = 512
batch_size = 16
num_shards = 8
heldout_fraction = 0.1
[optim]
lr = 1e-3
warmup_steps = 100
[mesh]
data = -1
"""


def count_gpus() -> int:
    """GPUs of this host; JAX is not asked, because it would take their memory."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.stdout.count("GPU ")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(count_gpus() not in (2, 4, 8), reason="needs 2, 4 or 8 GPUs of one host"),
]


class Launcher:
    """Starts train.py in one process for all GPUs, or in one for each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        text = "\0".join(
            f"document {i}: " + f"ab{i % 7} c" * (90 * (i % 11 + 1)) for i in range(99)
        )
        (root / "text.txt").write_text(text)
        (root / "run.toml").write_text(SETTINGS)

    def start(self, name: str, processes: int, *more: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        started = []
        for index in range(processes):
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
            arguments = ["--run_dir", str(self.root / name), *more]
            arguments += ["--data.files", str(self.root / "text.txt")]
            if processes > 1:
                environment["CUDA_VISIBLE_DEVICES"] = str(index)
                arguments += ["--processes.coordinator", address]
                arguments += ["--processes.count", str(processes), "--processes.index", str(index)]
            command = [sys.executable, str(ROOT / "train.py"), str(self.root / "run.toml")]
            started.append(
                subprocess.Popen(
                    [*command, *arguments], env=environment, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, text=True, cwd=self.root,
                )
            )  # fmt: skip
        return started

    def finish(self, started: list[subprocess.Popen[str]]) -> None:
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0] * len(started), outputs

    def losses(self, name: str) -> dict[int, float]:
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {record["step"]: record["loss"] for record in records if "loss" in record}


def test_a_process_for_each_gpu_and_the_loss_of_one(tmp_path):
    launcher, count = Launcher(tmp_path), count_gpus()
    launcher.finish(launcher.start("one", 1))
    expected = launcher.losses("one")
    assert expected[STEPS] < expected[50]
    launcher.finish(launcher.start("many", count))
    assert launcher.losses("many") == pytest.approx(expected, rel=2e-2)

    started = launcher.start("killed", count)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while (
        not metrics.exists() or max(launcher.losses("killed"), default=0) < 1.2 * CHECKPOINT_EVERY
    ):
        assert time.monotonic() < deadline
        assert started[-1].poll() is None
        time.sleep(0.02)
    started[-1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    outputs = [process.communicate(timeout=300)[0] for process in started]
    seconds = time.monotonic() - killed
    print(f"{count - 1} processes ended {seconds:.1f} s after one was killed")
    assert seconds < NOTICED_IN
    for process, output in zip(started[:-1], outputs, strict=False):
        assert process.returncode not in (0, None), output[-2000:]
        assert "--resume" in output, output[-2000:]
    launcher.finish(launcher.start("killed", count, "--resume"))
    assert launcher.losses("killed") == pytest.approx(launcher.losses("many"), rel=2e-2)
