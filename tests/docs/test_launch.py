"""The launch files: checked by their linters and schemas, and run with stand-ins for the clouds.

A stand-in of `srun` or `gcloud` starts two real processes, which find each other by the launcher's
variables.
"""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megalodon_jax.cli.main import parse
from megalodon_jax.config import TrainConfig
from tests.faults.run_process import ROOT, TOML

LAUNCH = ROOT / "docs" / "launch"
BIN = Path(sys.executable).parent
START_SECONDS = 120


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{BIN}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed; it comes with the extra dev on Linux")
    return found


def test_scripts_pass_shellcheck():
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    assert len(scripts) == 2
    done = subprocess.run([tool("shellcheck"), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_passes_hadolint():
    done = subprocess.run(
        [tool("hadolint"), str(LAUNCH / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_jobset_is_valid(tmp_path, monkeypatch):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="extra dev on Linux")
    import yaml

    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    # The schema of a Job is Kubernetes' own.
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
    job |= replicated["template"]
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    hosts = job["spec"]["parallelism"]
    assert job["spec"]["completions"] == hosts
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert int(rows) * int(columns) == hosts * container["resources"]["limits"]["google.com/tpu"]
    monkeypatch.chdir(tmp_path)
    parse([text.replace("BUCKET", "bucket") for text in container["args"]])


# `megalodon` with slow steps, so that a signal arrives before the last one.
WORKER = """
import sys, time
from megalodon_jax.cli.main import main
from megalodon_jax.data import pipeline
from megalodon_jax.training.metrics import ProgressDisplay

pipeline.PREFETCHED_TOKENS = 1 << 10
advance = ProgressDisplay.advance

def advance_slowly(self, step):
    time.sleep(0.15)
    advance(self, step)

ProgressDisplay.advance = advance_slowly
sys.exit(main(sys.argv[1:]))
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cloud(config: TrainConfig, tmp_path: Path, compilation_cache_dir: str) -> dict[str, str]:
    """Environment of a launch script: a home, a configuration, a `megalodon` of this checkout."""
    toml = TOML.format(steps=40, text_file=config.data.files[0], lr=1e-2)
    (tmp_path / "run.toml").write_text(toml + "\n[mesh]\ndata = 2\n")
    (tmp_path / "worker.py").write_text(WORKER)
    text = f'exec {sys.executable} {tmp_path}/worker.py "$@"\n'
    executable(tmp_path / "bin" / "megalodon", text)
    executable(tmp_path / "home" / "venv" / "bin" / "megalodon", text)
    return {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{tmp_path / 'bin'}:{BIN}:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COMPILATION_CACHE_DIR": compilation_cache_dir,
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(tmp_path),
    }


def launch(script: str, *arguments: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=START_SECONDS,
    )  # fmt: skip
    return f"{done.stdout}\nexit code {done.returncode}"


# Two tasks as `srun` starts them; the first try of the job gets a signal after its first save.
SRUN = """
pids=()
for rank in 0 1; do
  SLURM_JOB_ID=12345 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$rank \\
    SLURM_LOCALID=$rank "$@" &
  pids+=($!)
done
if [ ! -e requeued ]; then
  until [ -e "$RUN/checkpoints/3" ]; do sleep 0.1; done
  kill -TERM "${pids[@]}"
fi
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""


@pytest.mark.slow
def test_slurm_requeues_a_job_whose_time_is_over(cloud, tmp_path):
    executable(tmp_path / "bin" / "srun", SRUN)
    executable(tmp_path / "bin" / "scontrol", 'echo "scontrol $*"\ntouch requeued\n')
    run_dir = tmp_path / "run"
    environment = cloud | {"SLURM_JOB_ID": "12345", "RUN": str(run_dir)}
    arguments = ("run.toml", str(run_dir), "--watchdog_seconds", "0")
    first = launch("slurm.sh", *arguments, folder=tmp_path, environment=environment)
    assert "scontrol requeue 12345" in first
    assert "exit code 143" in first
    second = launch("slurm.sh", *arguments, folder=tmp_path, environment=environment)
    assert "of 2 processes" in second
    assert "resumed at step" in second
    assert "step 40/40" in second
    assert "exit code 0" in second


# A pod of two workers: absent, then active; the first start is preempted after its first save.
GCLOUD = """
echo "gcloud $*" >> "$LOG"
case "$*" in
  *queued-resources\\ describe*)
    if [ ! -e state ]; then exit 1; fi
    cat state ;;
  *queued-resources\\ create*) echo ACTIVE > state ;;
  *queued-resources\\ delete*) rm state ;;
  *scp*) [ -s "$5" ] ; cp "$5" "$HOME/source.tar.gz" ;;
  *ssh*)
    command="${@: -1}"
    cd "$HOME"
    if [[ $command == tar* ]]; then bash -c "$command"; exit; fi
    for rank in 0 1; do
      OMPI_MCA_orte_hnp_uri="1700000000.0;tcp://127.0.0.1:$PORT" OMPI_COMM_WORLD_SIZE=2 \\
        OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_LOCAL_RANK=$rank setsid bash -c "$command" &
    done
    if [ ! -e "$LOG.preempted" ]; then
      touch "$LOG.preempted"
      until [ -e "$RUN/checkpoints/3" ]; do sleep 0.1; done
      sleep 1
      echo SUSPENDED > "$OLDPWD/state"
      kill -KILL -- -"$(jobs -p %1)" -"$(jobs -p %2)"
    fi
    code=0
    wait %1 || code=$?
    wait %2 || code=$?
    exit $code ;;
esac
"""


@pytest.mark.slow
def test_a_preempted_pod_is_requested_again(cloud, tmp_path):
    executable(tmp_path / "bin" / "gcloud", GCLOUD)
    subprocess.run(["git", "init", "-q", "checkout"], cwd=tmp_path, check=True)
    checkout, run_dir = tmp_path / "checkout", tmp_path / "run"
    shutil.copy(tmp_path / "run.toml", checkout / "run.toml")
    for command in (("add", "run.toml"), ("commit", "-q", "-m", "Configuration")):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *command], cwd=checkout, check=True)
    environment = cloud | {
        "ZONE": "zone", "TYPE": "v5litepod-8", "RUNTIME": "runtime", "POLL_SECONDS": "0.1",
        "LOG": str(tmp_path / "log"), "RUN": str(run_dir), "PORT": "17291",
    }  # fmt: skip
    output = launch(
        "tpu_pod.sh", "pod", "run.toml", str(run_dir), folder=checkout, environment=environment
    )
    assert "exit code 0" in output
    calls = (tmp_path / "log").read_text()
    assert calls.count("queued-resources create pod") == 2
    assert calls.count("queued-resources delete pod") == 1
    assert "of 2 processes" in output
    assert "resumed at step" in output
    assert "step 40/40" in output
