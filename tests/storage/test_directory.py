"""The operations of a directory: the same on a disk and in both stores."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from megalodon_jax.checkpoints.directory import Directory, LocalDirectory, open_directory
from megalodon_jax.checkpoints.lock import FOLDER, RunLock
from megalodon_jax.checkpoints.manifest import verify_checkpoint, write_manifest
from megalodon_jax.checkpoints.store_directory import StoreDirectory
from megalodon_jax.errors import CheckpointError, RunLockedError, StoreUnreachableError
from tests.checkpoints.test_manifest import FILES


@pytest.fixture
def directory(store) -> Directory:
    return open_directory(f"{store.url}/run")


@pytest.fixture
def local(tmp_path) -> LocalDirectory:
    return LocalDirectory(tmp_path / "run")


def test_both_kinds_do_the_same(directory, local):
    """Every result is compared with that of a directory on a disk."""

    def history(of: Directory) -> list[object]:
        results: list[object] = [of.exists(), of.names()]
        of.make()
        folder = of.child("a")
        folder.make()
        results += [folder.create("x", b"1"), folder.create("x", b"2"), folder.read("x")]
        folder.write("y", b"long " * 1000)
        folder.write("y", b"")
        folder.child("deep").make()
        folder.child("deep").write("z", b"zz")
        results += [of.names(), folder.names(), folder.files(), of.files(), of.exists()]
        versions = [folder.version("x")]
        folder.touch("x")
        results += [folder.read("x"), folder.version("none")]
        versions.append(folder.version("x"))
        # S3 tells times in seconds.
        time.sleep(1.1)
        folder.touch("x")
        versions.append(folder.version("x"))
        results.append(versions[0] != versions[2])
        for missing in (lambda: folder.touch("none"), lambda: folder.read("none")):
            with pytest.raises(FileNotFoundError):
                missing()
        folder.remove("y")
        folder.remove("y")
        of.move("a", "b")
        results += [of.names(), of.child("b").files()]
        of.remove_tree("b")
        results += [of.child("b").names()]
        return results

    assert history(directory) == history(local)
    assert str(directory.child("c")) == f"{directory}/c"


def test_one_of_many_creates_an_object(directory):
    for number in range(3):
        barrier, created = threading.Barrier(6), []

        def create(index: int, number=number, barrier=barrier, created=created) -> None:
            barrier.wait()
            if directory.create(str(number), b"%d" % index):
                created.append(index)

        threads = [threading.Thread(target=create, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(created) == 1
        assert directory.read(str(number)) == b"%d" % created[0]


def test_an_answer_that_was_lost_does_not_refuse_its_own_object(directory):
    assert directory.create("x", b"mine")
    # The client repeats the request.
    assert directory.create("x", b"mine")
    assert not directory.create("x", b"another's")


def make_checkpoint(directory: Directory, root: Path) -> Directory:
    """A checkpoint of step 3 in a store, as it is uploaded there or written there."""
    originals = LocalDirectory(root / "3")
    for name, content in FILES.items():
        path = originals.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    target = directory.child("3")
    assert isinstance(target, StoreDirectory)
    target.upload(originals.path, list(FILES))
    is_uploaded = str(target).startswith("s3")
    write_manifest(target, 3, uploaded_from=originals if is_uploaded else None)
    return target


def test_a_manifest_compares_the_checksums_of_the_store(directory, store, tmp_path, monkeypatch):
    target = make_checkpoint(directory, tmp_path)
    content = b"weights of process 1"
    listed = target.read("manifest_0_of_1.txt").decode()
    assert ("etag:" + hashlib.md5(content).hexdigest() in listed) == (store.scheme == "s3")
    assert ("crc32c:" in listed) == (store.scheme == "gs")
    assert (hashlib.sha256(content).hexdigest() in listed) == (store.scheme == "s3")
    # Nothing but the manifest is downloaded.
    read, downloaded = type(target).read, []
    monkeypatch.setattr(type(target), "_blocks", lambda *_: pytest.fail("downloads a content"))
    monkeypatch.setattr(
        type(target), "read", lambda self, name: (downloaded.append(name), read(self, name))[1]
    )
    assert verify_checkpoint(target, 3).problems == ()
    assert verify_checkpoint(target, 3).num_files == len(FILES)
    assert set(downloaded) == {"manifest_0_of_1.txt"}


def test_every_change_of_an_object_is_found(directory, store, tmp_path):
    target = make_checkpoint(directory, tmp_path)
    name = "params/ocdbt.process_0/d/ab"
    for change, problem in (
        (lambda: target.write(name, FILES[name][:-1] + b"?"), f"{name} has another checksum"),
        (lambda: target.write(name, b"short"), f"{name} has 5 bytes instead of 20"),
        (lambda: target.remove(name), f"{name} is missing"),
    ):
        change()
        assert verify_checkpoint(target, 3).problems == (problem,)
        target.write(name, FILES[name])
        assert verify_checkpoint(target, 3).problems == ()
    target.write("params/new", b"")
    assert verify_checkpoint(target, 3).problems == ("params/new is not in the manifest",)
    target.remove("params/new")
    target.write("manifest_0_of_1.txt", target.read("manifest_0_of_1.txt").replace(b"20", b"21"))
    with pytest.raises(CheckpointError, match="has another checksum than it says"):
        verify_checkpoint(target, 3)


def test_copies_of_a_checkpoint_are_verified_elsewhere(directory, store, tmp_path):
    """A checkpoint copied to a disk, and within a store where that changes the ETag."""
    target = make_checkpoint(directory, tmp_path)
    copy = tmp_path / "copy"
    target.download(copy, list(target.files()))
    assert verify_checkpoint(LocalDirectory(copy), 3).problems == ()
    data = copy / "params/ocdbt.process_0/d/ab"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    problem = ("params/ocdbt.process_0/d/ab has another checksum",)
    assert verify_checkpoint(LocalDirectory(copy), 3).problems == problem
    if store.scheme == "s3":
        # An upload in parts gives another ETag.
        found = type(target)._checksums_of
        target._checksums_of = lambda entry: (f"{found(target, entry)[0]}-2",)  # type: ignore
        assert verify_checkpoint(target, 3).problems == ()
        target.write("params/_METADATA", b"other")
        assert verify_checkpoint(target, 3).problems == ("params/_METADATA has another checksum",)


def test_a_checkpoint_from_a_disk_is_verified_in_a_store(directory, tmp_path):
    target = make_checkpoint(directory, tmp_path)
    write_manifest(LocalDirectory(tmp_path / "3"), 3)
    target.upload(tmp_path / "3", ["manifest_0_of_1.txt"])
    assert verify_checkpoint(target, 3).problems == ()
    target.write("run/metadata", b"[]")
    assert verify_checkpoint(target, 3).problems == ("run/metadata has another checksum",)


def test_a_store_that_refuses_is_no_damage(directory, tmp_path, monkeypatch):
    target = make_checkpoint(directory, tmp_path)

    def refuse(*_, **__):
        raise RuntimeError("the network is down")

    monkeypatch.setattr(target._file_system, "find", refuse)
    with pytest.raises(StoreUnreachableError, match="RuntimeError: the network is down"):
        verify_checkpoint(target, 3)


def take(run_dir: str, **settings) -> RunLock:
    # S3 tells times in seconds.
    return RunLock(run_dir, **{"heartbeat_seconds": 1.1, "stale_seconds": 4.0, **settings})


def test_a_run_in_a_store_has_one_owner(store, capsys):
    run_dir = f"{store.url}/run"
    with take(run_dir) as lock:
        with pytest.raises(RunLockedError, match=f"is in use by pid {os.getpid()}"):
            take(run_dir)
        lock.check()
    begin = time.monotonic()
    take(run_dir).release()
    assert time.monotonic() - begin < 1.0
    assert len(open_directory(run_dir).child(FOLDER).names()) == 1


def test_a_lost_owner_is_replaced_and_leaves_when_it_goes_on(store, capsys):
    run_dir = f"{store.url}/run"
    first = take(run_dir, heartbeat_seconds=3600.0)
    begin = time.monotonic()
    with take(run_dir, stale_seconds=1.5) as second:
        assert time.monotonic() - begin >= 1.5
        assert "taking over" in capsys.readouterr().err
        with pytest.raises(RunLockedError, match=f"was taken over by pid {os.getpid()}"):
            first.check()
        first.release()
        # A late heartbeat of the former owner does not bring its lock back.
        with pytest.raises(FileNotFoundError):
            first._directory.touch("00000001")
        second.check()
    assert open_directory(run_dir).child(FOLDER).names() == ["00000002"]


@pytest.mark.slow
def test_of_many_threads_one_takes_over_each_time(store):
    run_dir = f"{store.url}/run"
    for _ in range(2):
        barrier, owners = threading.Barrier(4), []

        def compete(barrier=barrier, owners=owners) -> None:
            barrier.wait()
            try:
                owners.append(take(run_dir))
            except RunLockedError:
                return

        threads = [threading.Thread(target=compete) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(owners) == 1
        owners[0].release()


def test_a_bucket_that_cannot_be_written_is_an_error(store):
    store.refusal.touch()
    with pytest.raises(CheckpointError, match="cannot lock"):
        RunLock(f"{store.url}/run")
    store.refusal.unlink()
    with pytest.raises(CheckpointError, match="cannot lock"):
        RunLock(f"{store.scheme}://no-such-bucket/run")
