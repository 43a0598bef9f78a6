"""The lock of a run directory, between real processes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megalodon_jax.checkpoints.directory import LocalDirectory
from megalodon_jax.checkpoints.lock import FOLDER, LockOwner, RunLock
from megalodon_jax.errors import CheckpointError, RunLockedError

ROOT = Path(__file__).resolve().parents[2]
STALE = 1.0
# Takes the lock and answers a line for each of its input.
OWNER = f"""
import sys, types
# The package's __init__ imports JAX, which takes seconds.
package = types.ModuleType("megalodon_jax.checkpoints")
package.__path__ = [{str(ROOT / "megalodon_jax" / "checkpoints")!r}]
sys.modules[package.__name__] = package
from megalodon_jax.checkpoints.lock import RunLock
from megalodon_jax.errors import RunLockedError
try:
    with RunLock(sys.argv[1], heartbeat_seconds=0.1, stale_seconds={STALE}) as lock:
        print("owner", flush=True)
        for line in sys.stdin:
            lock.check()
            print("still owner", flush=True)
except RunLockedError as error:
    print(error, flush=True)
"""


class Process:
    """A process that takes the lock."""

    def __init__(self, run_dir: Path) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(run_dir)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def answer(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def ask(self) -> str:
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()
        return self.answer()


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[[], Process]]:
    started = []

    def start() -> Process:
        started.append(Process(tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.popen.kill()
        process.popen.communicate()


def take(run_dir: Path, **settings) -> RunLock:
    return RunLock(run_dir, **{"heartbeat_seconds": 0.1, "stale_seconds": STALE, **settings})


def foreign_lock(run_dir: Path, **fields) -> LocalDirectory:
    """A lock of a process on another machine."""
    owner = LockOwner("1234", "elsewhere", 99, "7", "another boot", "2026-01-01T00:00:00+00:00")
    directory = LocalDirectory(run_dir).child(FOLDER)
    directory.make()
    directory.create("00000007", json.dumps(owner._replace(**fields)._asdict()).encode())
    return directory


def test_a_second_process_is_refused_and_the_owner_named(tmp_path, start):
    first = start()
    assert first.answer() == "owner"
    refusal = start().answer()
    assert f"is in use by pid {first.popen.pid} on host {os.uname().nodename} since" in refusal
    assert re.search(r"heartbeat \d s ago", refusal)
    assert first.ask() == "still owner"


def test_a_killed_owner_is_replaced_at_once(tmp_path, start):
    first = start()
    assert first.answer() == "owner"
    first.popen.send_signal(signal.SIGKILL)
    first.popen.wait()
    begin = time.monotonic()
    with take(tmp_path, stale_seconds=60.0):
        assert time.monotonic() - begin < 10.0


def test_a_hanging_owner_is_replaced_and_leaves_when_it_goes_on(tmp_path, start):
    first = start()
    assert first.answer() == "owner"
    first.popen.send_signal(signal.SIGSTOP)
    time.sleep(STALE)
    with take(tmp_path) as lock:
        first.popen.send_signal(signal.SIGCONT)
        message = first.ask()
        assert f"was taken over by pid {os.getpid()}" in message
        assert "ends without writing" in message
        # Its end does not touch the lock of the new owner.
        first.popen.wait(timeout=5)
        lock.check()
        with pytest.raises(RunLockedError, match=f"in use by pid {os.getpid()}"):
            take(tmp_path)


def test_a_released_lock_is_free_also_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="of the run"), take(tmp_path):
        raise ValueError("of the run")
    with take(tmp_path):
        pass
    assert len(LocalDirectory(tmp_path).child(FOLDER).names()) == 1


def test_a_silent_lock_of_another_machine_is_taken_over(tmp_path, capsys):
    # Its clock is an hour ahead: only changes count.
    directory = foreign_lock(tmp_path)
    ahead = time.time() + 3600
    os.utime(directory.path / "00000007", (ahead, ahead))
    begin = time.monotonic()
    with take(tmp_path):
        assert STALE <= time.monotonic() - begin < 10 * STALE
        assert directory.names() == ["00000008"]
    assert "taking over" in capsys.readouterr().err


def test_a_living_lock_of_another_machine_is_respected(tmp_path):
    directory = foreign_lock(tmp_path)
    # Its clock is an hour behind.
    stop = threading.Event()

    def beat() -> None:
        behind = time.time() - 3600
        while not stop.wait(0.2):
            behind += 0.2
            os.utime(directory.path / "00000007", (behind, behind))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RunLockedError, match="in use by pid 99 on host elsewhere since 2026"):
            take(tmp_path)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("content", [b"", b'{"identity": "12', b"[]"])
def test_a_partly_written_lock_is_taken_over_when_it_is_stale(tmp_path, content):
    directory = foreign_lock(tmp_path)
    directory.write("00000007", content)
    with take(tmp_path, stale_seconds=0.3):
        assert directory.names() == ["00000008"]


def test_of_many_processes_one_takes_over(tmp_path, start):
    foreign_lock(tmp_path, released=True)
    answers = [process.answer() for process in [start() for _ in range(5)]]
    assert answers.count("owner") == 1
    assert sum("is in use by pid" in answer for answer in answers) == 4


def test_of_many_threads_one_takes_over_each_time(tmp_path):
    for _ in range(20):
        barrier = threading.Barrier(8)
        owners: list[RunLock] = []

        def compete(barrier=barrier, owners=owners) -> None:
            barrier.wait()
            with contextlib.suppress(RunLockedError):
                owners.append(take(tmp_path))

        threads = [threading.Thread(target=compete) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(owners) == 1
        owners[0].release()


def test_a_late_taker_gives_up(tmp_path, monkeypatch):
    """It finds number 7 stale, and creates 8 when 9 is in use and 8 removed."""
    directory = foreign_lock(tmp_path, released=True)
    create = LocalDirectory.create
    newer = []

    def create_late(self, name, content):
        if not newer:
            newer.append(None)
            for number in (8, 9):
                newer.append(take(tmp_path))
                assert directory.names() == [f"{number:08d}"]
                if number == 8:
                    newer[-1].release()
        return create(self, name, content)

    monkeypatch.setattr(LocalDirectory, "create", create_late)
    with pytest.raises(RunLockedError, match=f"in use by pid {os.getpid()}"):
        take(tmp_path)
    assert directory.names() == ["00000009"]
    newer[-1].check()
    newer[-1].release()


def test_a_removed_lock_is_noticed(tmp_path):
    lock = take(tmp_path)
    for name in os.listdir(tmp_path / FOLDER):
        os.unlink(tmp_path / FOLDER / name)
    with pytest.raises(RunLockedError, match="was removed"):
        lock.check()
    lock.release()


def test_a_failing_heartbeat_is_told_once_and_does_not_stop_the_owner(
    tmp_path, monkeypatch, capsys
):
    with take(tmp_path, heartbeat_seconds=0.02) as lock:

        def fail(self, name):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(LocalDirectory, "touch", fail)
        time.sleep(0.2)
        lock.check()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "cannot renew the lock" in lines[0]
    assert "No space left" in lines[0]


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot lock .*file"):
        RunLock(tmp_path / "file")
