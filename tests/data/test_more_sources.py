"""Folders, .zst, ArrayRecord, Hugging Face data sets, and files that are not text."""

import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalodon_jax.config import DataConfig
from megalodon_jax.data import load_tokenizer, make_loader, open_source
from megalodon_jax.data import parquet_files as parquet
from megalodon_jax.errors import DataError

TEXTS = ["erste Zeile é", "two", "drei 日本", "four\nlines"]


def _texts(path: Path | str, **settings: Any) -> list[str]:
    defaults = {"heldout_fraction": 0.0, "files": (str(path),)}
    config = DataConfig(**{**defaults, **settings})
    return [document.text for document in open_source(config, "train")]


def test_a_folder_stands_for_its_files(tmp_path: Path):
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    for name in ("b.txt", "deep/a.md", "c.py", ".d.txt", "deep/.hidden/e.txt", "f.tar.gz"):
        (tmp_path / name).write_text(name)
    (tmp_path / "deep/lines.jsonl").write_text(json.dumps({"text": "line"}))
    assert _texts(tmp_path) == ["b.txt", "deep/a.md", "line"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no file in folder .*none.* such as .*none/\*\.py"):
        _texts(tmp_path / "none")


@pytest.mark.parametrize("frames", [1, 3])
def test_zst(tmp_path: Path, frames: int):
    zstandard = pytest.importorskip("zstandard")
    whole = "\0".join(TEXTS).encode()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    for name, content in (("a.txt.zst", whole), ("a.jsonl.zst", lines)):
        size = -(-len(content) // frames)
        parts = [content[i : i + size] for i in range(0, len(content), size)]
        (tmp_path / name).write_bytes(b"".join(map(zstandard.compress, parts)))
    assert _texts(tmp_path / "a.txt.zst") == [whole.decode()]
    assert _texts(tmp_path / "a.txt.zst", document_separator="\0") == TEXTS
    assert _texts(tmp_path / "a.jsonl.zst") == TEXTS
    damaged = (tmp_path / "a.txt.zst").read_bytes()
    (tmp_path / "cut.txt.zst").write_bytes(damaged[:-3])
    with pytest.raises(DataError, match=r"cannot decompress .*cut\.txt\.zst"):
        _texts(tmp_path / "cut.txt.zst")
    (tmp_path / "other.txt.zst").write_bytes(b"no zstd at all")
    with pytest.raises(DataError, match=r"cannot decompress .*other\.txt\.zst"):
        _texts(tmp_path / "other.txt.zst")


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python reads zstd itself")
def test_zst_without_a_library_names_the_extra(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"install megalodon-flax\[zstd\] or decompress it"):
        _texts(tmp_path / "a.txt.zst")


def test_a_long_compressed_text_resumes_exactly(tmp_path: Path, monkeypatch):
    import gzip

    from megalodon_jax.data import pieces, pipeline

    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    monkeypatch.setattr(pipeline, "WINDOW_TOKENS", 64)
    text = "".join(f"line {i} é\n" for i in range(500))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.txt").write_text(text)
    loaders = [
        make_loader(
            DataConfig(files=(str(tmp_path / name),), seq_len=16, batch_size=2),
            load_tokenizer("bytes"), "train", repeat=True,
        )
        for name in ("a.txt", "a.txt.gz")
    ]  # fmt: skip
    expected, found = ([next(loader) for _ in range(60)] for loader in loaders)
    state = loaders[1].state_dict()
    expected += [next(loaders[0]) for _ in range(20)]
    found += [next(loaders[1]) for _ in range(20)]
    loaders[1].load_state_dict(state)
    found[60:] = [next(loaders[1]) for _ in range(20)]
    for a, b in zip(itertools.chain(*expected), itertools.chain(*found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_array_record(tmp_path: Path):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "a.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i, text in enumerate(TEXTS):
        record = json.dumps({"body": text}) if i % 2 else text
        writer.write(record.encode())
    writer.write(b"{no json")
    writer.close()
    assert _texts(path, text_field="body") == [*TEXTS, "{no json"]
    assert _texts(tmp_path, text_field="body") == [*TEXTS, "{no json"]
    with pytest.raises(DataError, match=r"record 1: no field 'text'; there are: body"):
        _texts(path)
    (tmp_path / "bad.array_record").write_bytes(b"no records" * 50)
    with pytest.raises(DataError, match=r"cannot read .*bad\.array_record as array_record"):
        _texts(tmp_path / "bad.array_record")


def test_blocks_of_parquet_are_read_in_order(tmp_path: Path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(parquet, "BLOCK_BYTES", 60)
    texts = [f"row {i} of the table" for i in range(50)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", row_group_size=20, use_dictionary=False
    )
    (tmp_path / "b.txt").write_text("row of a text")
    config = DataConfig(files=(str(tmp_path),), seq_len=32, batch_size=1, heldout_fraction=0.0)
    assert [d.text for d in open_source(config, "train")] == [*texts, "row of a text"]
    tokenizer = load_tokenizer("bytes")
    decoded = []
    opened: list[int] = []
    original = parquet._iterate
    monkeypatch.setattr(
        parquet, "_iterate", lambda *arguments: opened.append(arguments[2]) or original(*arguments)
    )
    loader = make_loader(config, tokenizer, "train", repeat=False)
    opened.clear()
    for batch in loader:
        decoded += batch.targets[batch.weights > 0].tolist()
    found = "".join("|" if i == 256 else chr(i) for i in decoded).strip("|").split("|")
    assert sorted(found) == sorted([*texts, "row of a text"])
    assert found != [*texts, "row of a text"]
    # Every row group is opened once, or not again.
    assert len(opened) == len(set(opened)) >= 2


@pytest.fixture
def datasets():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("datasets")


def test_saved_hugging_face_data_sets(tmp_path: Path, datasets):
    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_dict({"body": TEXTS})
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(
        str(tmp_path / "two")
    )
    settings: dict[str, Any] = {"files": (), "text_field": "body"}
    assert _texts("", hf_path=str(tmp_path / "one"), **settings) == TEXTS
    assert _texts("", hf_path=str(tmp_path / "two"), hf_split="test", **settings) == ["two"]
    with pytest.raises(DataError, match="has no split 'dev'; there are: train, test"):
        _texts("", hf_path=str(tmp_path / "two"), hf_split="dev", **settings)
    with pytest.raises(DataError, match=r"cannot open the Hugging Face data set .*none"):
        _texts("", hf_path=str(tmp_path / "none"), **settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("carry_state", [False, True])
def test_streamed_hugging_face_data_sets(tmp_path: Path, datasets, monkeypatch, carry_state):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [f"document {i}" for i in range(30)]
    for part in range(2):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[15 * part : 15 * part + 15])
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    config = DataConfig(
        files=(str(tmp_path / "*.jsonl"),), hf_path="json", hf_streaming=True, seq_len=16,
        batch_size=2, heldout_fraction=0.2, carry_state=carry_state,
    )  # fmt: skip
    tokenizer = load_tokenizer("bytes")
    parts = []
    for split in ("train", "heldout"):
        loader = make_loader(config, tokenizer, split, repeat=False)
        targets = np.concatenate([batch.targets[batch.weights > 0] for batch in loader])
        parts.append("".join("|" if i == 256 else chr(i) for i in targets).strip("|").split("|"))
    assert sorted([*parts[0], *parts[1]]) == sorted(texts)
    # In the files' order.
    assert parts[0] == [text for text in texts if text in parts[0]]
    loader = make_loader(config, tokenizer, "train", repeat=True)
    states, batches = [], []
    for _ in range(30):
        states.append(json.dumps(loader.state_dict()))
        batches.append(next(loader))
    for step in (0, 4, 17, 25):
        loader.load_state_dict(json.loads(states[step]))
        for expected in batches[step : step + 5]:
            for a, b in zip(next(loader), expected, strict=True):
                np.testing.assert_array_equal(a, b)
    loader.close()


def test_hugging_face_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"install megalodon-flax\[hf\]"):
        open_source(DataConfig(hf_path="somewhere"), "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"}]', r"a\.json: JSON .* is read as plain text; .* \.jsonl file"),
        ("a.txt", b"PK\x03\x04 and more", "begins like a zip file"),
        ("a", b"\x1f\x8b text", "begins like a gzip file"),
        ("a.txt", b"one\0two", "NUL bytes; if they separate documents"),
    ],
)
def test_files_that_are_no_text_are_warned_of(tmp_path: Path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning, match=message):
        open_source(DataConfig(files=(str(tmp_path / name),)), "train")
    # No warning with the separator.
    if b"one" in content:
        assert _texts(tmp_path / name, document_separator="\0") == ["one", "two"]
