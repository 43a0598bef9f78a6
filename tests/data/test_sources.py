"""Sources: documents, their order, the held-out split, and messages about bad data."""

import gzip
import json
import pickle
import sysconfig
import tokenize
from pathlib import Path

import pytest

from megalodon_jax.config import DataConfig
from megalodon_jax.data import Document, Source, open_source
from megalodon_jax.errors import DataError


def _files(*patterns: object, **settings: object) -> DataConfig:
    settings = {"heldout_fraction": 0.0, **settings}
    return DataConfig(source="files", files=tuple(map(str, patterns)), **settings)  # type: ignore[arg-type]


def _texts(config: DataConfig, split: str = "train") -> list[str]:
    return [document.text for document in open_source(config, split)]  # type: ignore[arg-type]


def _write_jsonl(path: Path, texts: list[str | None], field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": 1, field: text}) + "\n\n" for text in texts)
    content = lines.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(scope="module")
def stdlib() -> tuple[Source, Source]:
    config = DataConfig()
    return open_source(config, "train"), open_source(config, "heldout")


def test_stdlib_is_split_by_file(stdlib: tuple[Source, Source]):
    train, heldout = ([source.name(i) for i in range(len(source))] for source in stdlib)
    assert train == sorted(train)
    assert heldout == sorted(heldout)
    assert not set(train) & set(heldout)
    assert {"json/decoder.py", "typing.py"} <= set(train + heldout)
    assert 0.02 < len(heldout) / len(train + heldout) < 0.09
    directories = {name for path in train + heldout for name in path.split("/")[:-1]}
    assert not directories & {"test", "tests", "site-packages", "__pycache__"}


def test_stdlib_texts_are_the_files(stdlib: tuple[Source, Source]):
    root = Path(sysconfig.get_path("stdlib"))
    for source in stdlib:
        for index in range(0, len(source), 29):
            name, text = source[index]
            with tokenize.open(root / name) as file:
                assert text == file.read()


def test_stdlib_split_is_stable(stdlib: tuple[Source, Source]):
    # The split depends on the hash of the name only: the same in every run and on every machine.
    heldout = {document.name for document in stdlib[1]}
    train = {stdlib[0].name(i) for i in range(len(stdlib[0]))}
    assert {"json/decoder.py", "typing.py"} <= train
    assert {"gzip.py", "pprint.py", "urllib/request.py"} <= heldout


def test_globs_are_sorted_and_named_from_their_common_directory(tmp_path, monkeypatch):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    for name in ("b/deep/2.txt", "b/1.txt", "a/3.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "a" / "empty.txt").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = [Document(n, f"text of {n}") for n in ("a/3.txt", "b/1.txt", "b/deep/2.txt")]
    assert list(open_source(_files("~/**/*.txt"), "train")) == expected
    source = open_source(_files("~/b/**/*.txt", "~/a/*.txt", tmp_path / "b/1.txt"), "train")
    assert list(source) == expected
    assert source[-1] == expected[-1]
    with pytest.raises(IndexError):
        source[3]


def test_a_path_with_glob_characters_is_a_path(tmp_path):
    (tmp_path / "data[1].txt").write_text("x")
    assert _texts(_files(tmp_path / "data[1].txt")) == ["x"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_all_kinds_of_files_hold_the_same_documents(tmp_path, suffix):
    import pyarrow
    import pyarrow.parquet

    texts = ["first\r\n", "zweiter Text é 日本", "x" * 300, " third "]
    content = "<|>".join([*texts[:2], " \n", "", *texts[2:]]) + "<|>"
    packed = gzip.compress(content.encode()) if suffix else content.encode()
    (tmp_path / f"all.txt{suffix}").write_bytes(packed)
    assert _texts(_files(tmp_path / f"all.txt{suffix}", document_separator="<|>")) == texts
    _write_jsonl(tmp_path / f"all.jsonl{suffix}", texts, field="body")  # type: ignore[arg-type]
    assert _texts(_files(tmp_path / f"all.jsonl{suffix}", text_field="body")) == texts
    table = pyarrow.table({"other": [1, 2, 3, 4], "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "all.parquet", row_group_size=2)
    assert _texts(_files(tmp_path / "all.parquet", text_field="body")) == texts


def test_a_gzip_file_is_one_document(tmp_path):
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress("a\x00é".encode()))
    assert list(open_source(_files(tmp_path / "book.txt.gz"), "train")) == [
        Document("book.txt.gz", "a\x00é")
    ]


def test_documents_are_named_by_file_and_position(tmp_path):
    _write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    (tmp_path / "b.txt").write_text("z")
    names = [document.name for document in open_source(_files(tmp_path / "*"), "train")]
    assert names == ["a.jsonl#0", "a.jsonl#1", "b.txt"]


def test_sources_pickle_without_their_content(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts: list[str | None] = [f"{i}" * 2000 for i in range(50)]
    _write_jsonl(tmp_path / "a.jsonl.gz", texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "b.parquet")
    source = open_source(_files(tmp_path / "*"), "train")
    before = list(source)
    pickled = pickle.dumps(source)
    assert len(pickled) < 5000
    assert list(pickle.loads(pickled)) == before


def test_nulls_and_lone_surrogates(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a\\ud800b"}\n')
    assert _texts(_files(tmp_path / "a.jsonl")) == ["", "a?b"]


def test_heldout_documents_are_chosen_by_name(tmp_path):
    _write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(400)])
    config = _files(tmp_path / "a.jsonl", heldout_fraction=0.25)
    train, heldout = set(_texts(config)), set(_texts(config, "heldout"))
    assert not train & heldout
    assert len(train | heldout) == 400
    assert 70 < len(heldout) < 130
    smaller = set(_texts(_files(tmp_path / "a.jsonl", heldout_fraction=0.1), "heldout"))
    assert smaller < heldout


def test_heldout_files(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    config = _files(tmp_path / "*.txt", heldout_files=(str(tmp_path / "b.txt"),))
    assert _texts(config) == ["a", "c"]
    assert _texts(config, "heldout") == ["b"]
    with pytest.raises(DataError, match=r"is in data.heldout_files too"):
        open_source(_files(tmp_path / "b.txt", heldout_files=(str(tmp_path / "*"),)), "train")


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_the_end_of_a_single_text_is_held_out(tmp_path, fraction):
    text = "".join(chr(0x3B1 + i % 20) for i in range(1000))
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    config = _files(tmp_path / "one.txt", heldout_fraction=fraction)
    cut = 1000 - round(1000 * fraction)
    assert _texts(config) == [text[:cut]]
    assert _texts(config, "heldout") == [text[cut:]]


def test_nothing_held_out(tmp_path):
    (tmp_path / "one.txt").write_text("text")
    assert _texts(_files(tmp_path / "one.txt")) == ["text"]
    with pytest.raises(DataError, match="heldout_fraction is 0"):
        open_source(_files(tmp_path / "one.txt"), "heldout")


def test_fingerprints_follow_the_data(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 40)
    config = _files(tmp_path / "a.txt", heldout_fraction=0.1)
    prints = {open_source(config, split).fingerprint() for split in ("train", "heldout")}
    assert open_source(config, "train").fingerprint() in prints
    (tmp_path / "a.txt").write_text("texts " * 40)
    prints.add(open_source(config, "train").fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff", r"a\.txt: not UTF-8 text \(byte 3 is 0xff\)"),
        ("a.txt.gz", b"no gzip", r"cannot decompress .*a\.txt\.gz"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-12], r"cannot decompress .*a\.txt\.gz"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl:3: not a line of JSON"),
        ("a.jsonl", b'\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", b'{"body": "x", "id": 3}', r"a\.jsonl:1: no field 'text'; .*: body, id"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: expected an object with a field 'text', got \[1\]"),
        ("a.jsonl", b'{"text": 7}', r"a\.jsonl:1: field 'text' is 7; the text must be a string"),
        ("a.parquet", b"no parquet", r"cannot read .*a\.parquet as parquet"),
        ("a.txt", b"", r"no document for split 'train': .*a\.txt"),
        ("a.jsonl", b"\n \n", r"no document for split 'train': .*a\.jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        _texts(_files(tmp_path / name))


def test_bad_parquet_fields_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no field 'text'; there are: body, n"):
        open_source(_files(tmp_path / "a.parquet"), "train")
    with pytest.raises(DataError, match=r"field 'n' is of type int64; the text must be a string"):
        open_source(_files(tmp_path / "a.parquet", text_field="n"), "train")


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(DataError, match=r"no file matches '.*none/\*\.txt'"):
        open_source(_files(tmp_path / "none/*.txt"), "train")
    with pytest.raises(DataError, match=r"no file in folder .* ends in \.txt, .*such as .*\*\.py"):
        open_source(_files(tmp_path), "train")
    (tmp_path / "a.txt").write_text("x")
    source = open_source(_files(tmp_path / "a.txt"), "train")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: No such file"):
        source[0]


def test_unknown_split(tmp_path):
    with pytest.raises(DataError, match="split is 'test'; use 'train' or 'heldout'"):
        open_source(DataConfig(), "test")  # type: ignore[arg-type]
