"""The short form of `tests.faults.storage`, and what a full disk does to the log.

The long form has every fault at every kind of write.
"""

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest

from megalodon_jax.errors import TrainingError
from megalodon_jax.training.loop import train
from megalodon_jax.training.metrics import RunLog
from tests.faults.storage import Case, Harness, all_cases, mounted_volume


@pytest.fixture
def volume(tmp_path):
    try:
        context = mounted_volume(tmp_path)
        volume = context.__enter__()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user cannot mount a file system")
    yield volume
    context.__exit__(None, None, None)


@pytest.mark.slow
def test_a_full_disk_and_a_crash_of_the_file_system(
    tmp_path, text_file, compilation_cache_dir, volume
):
    harness = Harness(tmp_path, volume, text_file, cache=compilation_cache_dir)
    full = harness.run(Case("full", "evaluating", 2))
    assert full.faults == []
    assert "No space left on device" in full.message
    # The file system loses what has not reached the disk.
    crash = harness.run(Case("read-only", "before a save", 3))
    assert crash.faults == []
    # Writes are refused as on a read-only file system, `fsync` fails as on a lost disk.
    assert re.search("Read-only file system|Input/output error", crash.message)
    assert "still usable: step 7" in crash.message


def test_the_long_form_has_every_kind_of_write():
    assert len({str(case) for case in all_cases()}) == len(all_cases()) == 84


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["lines", "tensorboard"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, name):
    log = RunLog(tmp_path, config={})
    log.write(1, {"loss": 1.0})
    full = os.open("/dev/full", os.O_WRONLY)
    handle = log._lines if name == "lines" else log._writers[0]._file._file  # type: ignore[attr-defined]
    os.dup2(full, handle.fileno())
    os.close(full)
    with pytest.raises(OSError, match="metrics.jsonl" if name == "lines" else "tensorboard") as e:
        log.write(2, {"loss": 1.0})
    assert e.value.errno == errno.ENOSPC
    os.dup2(os.open(os.devnull, os.O_WRONLY), handle.fileno())
    log.close()


@pytest.mark.slow
def test_a_failing_log_ends_the_run_with_the_checkpoint(
    shared_compilation, short_prefetch, config, monkeypatch
):
    write = RunLog.write

    def fail(self, step, metrics):
        if step == 5:
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
        write(self, step, metrics)

    monkeypatch.setattr(RunLog, "write", fail)
    message = rf"{config.run_dir} cannot continue: .*No space left.*metrics.jsonl.*of step 3 saved"
    with pytest.raises(TrainingError, match=message):
        train(config)
