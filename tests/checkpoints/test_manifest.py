"""The manifest of a checkpoint: what it covers, and that nothing that differs from it passes."""

import hashlib
import os
from pathlib import Path

import pytest

from megalodon_jax.checkpoints.directory import LocalDirectory
from megalodon_jax.checkpoints.manifest import (
    has_all_parts,
    part_name,
    remove_checkpoint,
    verify_checkpoint,
    write_manifest,
)
from megalodon_jax.errors import CheckpointError, IncompleteCheckpointError

FILES = {
    "_CHECKPOINT_METADATA": b"top",
    "params/_METADATA": b"names",
    "params/ocdbt.process_0/d/ab": b"weights of process 0",
    "params/ocdbt.process_1/d/ab": b"weights of process 1",
    "params/array_metadatas/process_1": b"shapes",
    "opt_state/ocdbt.process_0/d/cd": b"moments",
    "run/metadata": b"{}",
}


def make_checkpoint(root: Path, step: int, *, num_processes: int = 1) -> LocalDirectory:
    for name, content in FILES.items():
        path = root / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + b" of step %d" % step)
    directory = LocalDirectory(root / str(step))
    for process in range(num_processes):
        write_manifest(directory, step, process=process, num_processes=num_processes)
    return directory


def problems(directory: LocalDirectory, step: int = 3, **settings) -> tuple[str, ...]:
    return verify_checkpoint(directory, step, **settings).problems


def test_an_intact_checkpoint_has_no_problems(tmp_path):
    directory = make_checkpoint(tmp_path, 3)
    result = verify_checkpoint(directory, 3)
    assert result.problems == ()
    assert result.num_files == len(FILES)
    assert result.num_bytes == sum(len(content) + len(" of step 3") for content in FILES.values())


def test_checksums_are_sha256(tmp_path):
    directory = make_checkpoint(tmp_path, 3)
    content = os.urandom((1 << 20) + 13)
    (directory.path / "big").write_bytes(content)
    assert directory.checksums("big") == (hashlib.sha256(content).hexdigest(),)


def test_all_files_are_on_the_disk_before_the_manifest(tmp_path, monkeypatch):
    synced: set[tuple[int, int]] = set()
    fsync, replace = os.fsync, os.replace

    def record(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.add((status.st_dev, status.st_ino))
        fsync(descriptor)

    at_manifest: list[Path] = []

    def check(source, target) -> None:
        # Also the folders, without which the files have no names, up to that of all checkpoints.
        paths = [tmp_path, tmp_path / "3", *(tmp_path / "3").rglob("*")]
        at_manifest.extend(
            path for path in paths if (path.stat().st_dev, path.stat().st_ino) not in synced
        )
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", check)
    make_checkpoint(tmp_path, 3)
    assert len(synced) > len(FILES)
    assert at_manifest == []


def test_every_process_lists_the_files_that_it_wrote(tmp_path):
    directory = make_checkpoint(tmp_path, 3, num_processes=2)
    second = directory.read(part_name(1, 2)).decode()
    for name in FILES:
        assert (name in second) == ("process_1" in name)
    assert problems(directory) == ()
    # Two processes share the work of a comparison, and miss nothing together.
    (directory.path / "params/ocdbt.process_1/d/ab").write_bytes(b"Weights of process 1 of step 3")
    shares = [problems(directory, process=index, num_processes=2) for index in range(2)]
    assert sorted(shares) == [(), ("params/ocdbt.process_1/d/ab has another checksum",)]


def test_a_part_that_is_missing_is_an_error(tmp_path):
    directory = make_checkpoint(tmp_path, 3, num_processes=2)
    assert has_all_parts(directory.names())
    directory.remove(part_name(1, 2))
    assert not has_all_parts(directory.names())
    with pytest.raises(CheckpointError, match=r"parts of its manifest are manifest_0_of_2\.txt"):
        problems(directory)


def test_a_checkpoint_without_manifest_is_incomplete(tmp_path):
    directory = make_checkpoint(tmp_path, 3)
    directory.remove(part_name(0, 1))
    with pytest.raises(IncompleteCheckpointError, match=r"no manifest .*--allow_unverified"):
        problems(directory)


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_single_bit_counts(tmp_path, name):
    directory = make_checkpoint(tmp_path, 3)
    path = directory.path / name
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert problems(directory) == (f"{name} has another checksum",)


def test_bits_and_the_length_of_the_manifest_count(tmp_path):
    directory = make_checkpoint(tmp_path, 3)
    path = directory.path / part_name(0, 1)
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 11):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="another checksum than it says"):
            problems(directory)
    for length in range(0, len(content), 17):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="another checksum than it says"):
            problems(directory)


def test_removed_added_and_truncated_files_are_named(tmp_path):
    directory = make_checkpoint(tmp_path, 3)
    directory.remove("run/metadata")
    (directory.path / "params/ocdbt.process_0/d/ab").write_bytes(b"weights")
    # OCDBT would read a file of a further process; a link may change its target later.
    (directory.path / "params/ocdbt.process_2").mkdir()
    (directory.path / "params/ocdbt.process_2/manifest.ocdbt").write_bytes(b"more weights")
    (directory.path / "link").symlink_to("params/_METADATA")
    assert problems(directory) == (
        "link is not in the manifest",
        "params/ocdbt.process_0/d/ab has 7 bytes instead of 30",
        "params/ocdbt.process_2/manifest.ocdbt is not in the manifest",
        "run/metadata is missing",
    )


def test_a_link_in_place_of_a_file_is_found(tmp_path):
    directory = make_checkpoint(tmp_path, 3)
    path = directory.path / "run/metadata"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert problems(directory) == ("run/metadata has -1 bytes instead of 12",)


def test_a_checkpoint_under_the_name_of_another_step_is_found(tmp_path):
    make_checkpoint(tmp_path, 3).path.rename(tmp_path / "5")
    with pytest.raises(CheckpointError, match="says step 3 instead of 5"):
        problems(LocalDirectory(tmp_path / "5"), 5)


def test_files_of_another_step_are_found(tmp_path):
    older, newer = make_checkpoint(tmp_path, 3), make_checkpoint(tmp_path, 4)
    (newer.path / "params/_METADATA").write_bytes(older.read("params/_METADATA"))
    assert problems(newer, 4) == ("params/_METADATA has another checksum",)
    newer.write(part_name(0, 1), older.read(part_name(0, 1)))
    with pytest.raises(CheckpointError, match="says step 3 instead of 4"):
        problems(newer, 4)


def test_only_the_items_asked_for_are_read(tmp_path):
    directory = make_checkpoint(tmp_path, 3)
    name = "opt_state/ocdbt.process_0/d/cd"
    (directory.path / name).write_bytes(b"momentS of step 3")
    assert problems(directory, items={"params", "run"}) == ()
    assert problems(directory, items={"opt_state"}) == (f"{name} has another checksum",)
    (directory.path / name).write_bytes(b"")
    assert problems(directory, items={"params", "run"}) == (f"{name} has 0 bytes instead of 17",)


def test_an_interrupted_removal_leaves_an_incomplete_checkpoint(tmp_path, monkeypatch):
    directory = make_checkpoint(tmp_path, 3)
    monkeypatch.setattr(LocalDirectory, "remove_tree", lambda *_: None)
    remove_checkpoint(LocalDirectory(tmp_path), 3)
    with pytest.raises(IncompleteCheckpointError):
        problems(directory)
    monkeypatch.undo()
    remove_checkpoint(LocalDirectory(tmp_path), 3)
    assert not directory.path.exists()


def test_writing_a_manifest_twice_changes_nothing(tmp_path):
    directory = make_checkpoint(tmp_path, 3)
    before = directory.read(part_name(0, 1))
    write_manifest(directory, 3)
    assert directory.read(part_name(0, 1)) == before
