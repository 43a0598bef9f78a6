"""Data in a store: the same documents, names and batches as the same files on a disk."""

import dataclasses
import gzip
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megalodon_jax.config import DataConfig, HeldoutSet, MixtureSource
from megalodon_jax.data import ByteTokenizer, make_loader, open_source
from megalodon_jax.data.find_files import find_files
from megalodon_jax.data.tokenizer import load_tokenizer
from megalodon_jax.errors import DataError
from megalodon_jax.storage.location import data_file_system
from tests.data.tokenizer_files import save_json_tokenizer, save_sentencepiece

zstandard = pytest.importorskip("zstandard")

WORDS = [
    "what",
    "is",
    "written",
    "in",
    "a",
    "store",
    "reads",
    "like",
    "what",
    "is",
    "written",
    "on",
    "a",
    "disk",
    "é日本",
    "",
]


def text(number: int) -> str:
    draw = random.Random(number)
    return f"document {number}: " + " ".join(draw.choices(WORDS, k=20 + 7 * (number % 5)))


def write_files(folder: Path) -> None:
    """Every format, in a folder with subfolders; 3 documents a file."""
    (folder / "sub" / ".hidden").mkdir(parents=True)
    texts = [text(number) for number in range(3)]
    lines = "".join(json.dumps({"text": entry, "n": 1}) + "\n" for entry in texts)
    joined = "\0".join(texts).encode()
    files = {
        "plain.txt": joined,
        "sub/a.txt.gz": gzip.compress(joined),
        "sub/b.txt.zst": zstandard.compress(joined),
        "sub-2/lines.jsonl": lines.encode(),
        "lines.jsonl.gz": gzip.compress(lines.encode()),
        "sub/lines.jsonl.zst": zstandard.compress(lines.encode()),
        "sub/.hidden/no.txt": b"not this one",
        "picture.png": b"\x89PNG",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    table = pyarrow.table({"text": texts, "other": ["x" * 1000] * 3})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    write_files(folder)
    return folder


@pytest.fixture
def url(store, folder) -> str:
    """The same folder in the store."""
    for path in folder.rglob("*"):
        if path.is_file():
            store.write(f"corpus/{path.relative_to(folder)}", path.read_bytes())
    return f"{store.url}/corpus"


def config_of(*files: str, **settings) -> DataConfig:
    defaults = {"document_separator": "\0", "heldout_fraction": 0.0, "seq_len": 16, "batch_size": 2}
    return DataConfig(files=files, **{**defaults, **settings})  # type: ignore[arg-type]


def documents(config: DataConfig, split="train") -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in open_source(config, split)]


PATTERNS = (
    "",
    "/*.txt",
    "/**/*.zst",
    "/sub*/*",
    "/plain.txt",
    "/*.jsonl.gz",
    "/rows.parquet",
    "/s?b",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_format_reads_like_on_a_disk(folder, url, pattern):
    if pattern == "/s?b":
        # A glob that matches only a folder matches no file.
        for place in (str(folder), url):
            with pytest.raises(DataError, match=r"no (file|object) matches"):
                find_files([place + pattern])
        return
    expected = documents(config_of(f"{folder}{pattern}"))
    assert documents(config_of(f"{url}{pattern}")) == expected
    assert len(expected) >= 3
    assert {entry[1] for entry in expected} == {text(number) for number in range(3)}
    # The same documents are held out.
    halves = [
        documents(config_of(f"{place}{pattern}", heldout_fraction=0.4), "heldout")
        for place in (folder, url)
    ]
    assert halves[0] == halves[1]
    fingerprints = {
        open_source(config_of(f"{place}{pattern}"), "train").fingerprint()
        for place in (folder, url)
    }
    assert len(fingerprints) == 1


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_whole_files_are_read_in_pieces(store, tmp_path, suffix):
    content = "\n".join(map(text, range(50))).encode()
    if suffix == ".gz":
        content = gzip.compress(content)
    elif suffix == ".zst":
        # Two frames: the second one begins inside a character.
        middle = content.index("é".encode()) + 1
        content = b"".join(map(zstandard.compress, (content[:middle], content[middle:])))
    path = tmp_path / f"whole.txt{suffix}"
    path.write_bytes(content)
    url = store.write(path.name, content)
    sources = [
        open_source(config_of(str(place), document_separator=""), "train") for place in (path, url)
    ]
    contents = [source.open(0) for source in sources]
    size = contents[0].num_bytes()
    assert size == contents[1].num_bytes()
    # Forward, across the end, and backward.
    for start, length in ((0, 7), (100, 50), (size - 5, 100), (3, size), (size, 5)):
        first, second = (content.read(start, length) for content in contents)
        assert first == second, start
    assert [source.where(0) for source in sources] == [str(path), url]


def test_held_out_files_and_mixtures_lie_in_a_store(folder, url):
    def configs(place: object) -> DataConfig:
        return config_of(
            sources=(
                MixtureSource(name="a", files=(f"{place}/plain.txt",), document_separator="\0"),
                MixtureSource(name="b", files=(f"{place}/rows.parquet",), weight=2.0),
            ),
            heldout_sets=(HeldoutSet(name="c", files=(f"{place}/lines.jsonl.gz",)),),
        )

    for split, name in (("train", "a"), ("train", "b"), ("heldout", "c")):
        first, second = (open_source(configs(place), split, name=name) for place in (folder, url))
        assert list(first) == list(second)
    both = config_of(f"{url}", heldout_files=(f"{url}/*.parquet",))
    assert "rows.parquet" not in {name.partition("#")[0] for name, _ in documents(both)}
    assert len(documents(both, "heldout")) == 3


def batches(config: DataConfig, count: int = 6) -> list[np.ndarray]:
    loader = make_loader(config, ByteTokenizer(), "train", repeat=True)
    try:
        return [np.asarray(next(loader).tokens) for _ in range(count)]
    finally:
        loader.close()


def test_batches_equal_those_of_a_disk_and_resume(folder, url):
    local, stored = config_of(str(folder)), config_of(url)
    expected = batches(local)
    np.testing.assert_array_equal(batches(stored), expected)
    loader = make_loader(local, ByteTokenizer(), "train", repeat=True)
    for _ in range(3):
        next(loader)
    state = loader.state_dict()
    loader.close()
    # A run that moves into a store goes on with the same data.
    moved = make_loader(stored, ByteTokenizer(), "train", repeat=True)
    moved.load_state_dict(state)
    np.testing.assert_array_equal([next(moved).tokens for _ in range(3)], expected[3:])
    moved.close()


@pytest.mark.slow
def test_workers_read_a_store(folder, url):
    local, stored = (config_of(str(place), num_workers=1) for place in (folder, url))
    np.testing.assert_array_equal(batches(stored), batches(local))


# The emulator's client sends large bodies in a way that one of its libraries warns of.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
@pytest.mark.slow
def test_a_row_group_is_read_without_the_others(store, tmp_path, monkeypatch):
    draw = random.Random(0)
    texts = [draw.randbytes(1 << 19).hex() for _ in range(24)]
    path = tmp_path / "large.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1)
    source = open_source(config_of(store.write("large.parquet", path.read_bytes())), "train")
    # As a worker process gets it.
    source = pickle.loads(pickle.dumps(source))
    fetched: list[int] = []
    cat = type(data_file_system(store.scheme))._cat_file

    async def count(self, path, start=None, end=None, **settings):
        content = await cat(self, path, start=start, end=end, **settings)
        fetched.append(len(content))
        return content

    monkeypatch.setattr(type(data_file_system(store.scheme)), "_cat_file", count)
    opened = type(data_file_system(store.scheme).open(store.key("large.parquet")))
    fetch = opened._fetch_range

    def count_range(self, start, end):
        content = fetch(self, start, end)
        fetched.append(len(content))
        return content

    monkeypatch.setattr(opened, "_fetch_range", count_range)
    assert source[17].text == texts[17]
    assert len(texts[17]) / 2 < sum(fetched) < path.stat().st_size / 2


def test_what_a_store_lacks_is_named(store, url):
    store.write("pictures/a.png", b"")
    for pattern, message in (
        (f"{url}/none.txt", "no object matches"),
        (f"{store.url}/pictures", "no file in folder"),
        (f"{store.scheme}://no-such-bucket/*.txt", "(no object matches|cannot read)"),
    ):
        with pytest.raises(DataError, match=message):
            find_files([pattern])
    store.write("corpus/a.array_record", b"0")
    with pytest.raises(DataError, match="reads files of disks only; copy the file to a disk"):
        open_source(config_of(f"{url}/a.array_record"), "train")
    with pytest.raises(DataError, match="are read from disks only"):
        open_source(DataConfig(hf_path=url), "train")


def test_a_file_that_vanishes_is_an_error(store, url):
    source = open_source(config_of(f"{url}/plain.txt"), "train")
    store.files.rm_file(store.key("corpus/plain.txt"))
    with pytest.raises(DataError, match=r"plain\.txt"):
        source.text(0)


@pytest.mark.parametrize("save", [save_json_tokenizer, save_sentencepiece])
def test_a_tokenizer_is_read_from_a_store(store, tmp_path, save: Callable):
    if save is save_json_tokenizer:
        path = save(tmp_path / "own.json", ["<a>", "<b>"])
        config = json.dumps({"bos_token": "<b>", "eos_token": "<a>"}).encode()
        (tmp_path / "tokenizer_config.json").write_bytes(config)
        store.write("tokenizer_config.json", config)
    else:
        path = save(tmp_path / "own.model")
    url = store.write(path.name, path.read_bytes())
    local, stored = load_tokenizer(str(path)), load_tokenizer(url)
    assert stored.fingerprint() == local.fingerprint()
    assert stored.encode("hello world").tolist() == local.encode("hello world").tolist()
    with pytest.raises(DataError, match="cannot read tokenizer"):
        load_tokenizer(f"{store.url}/none.json")


@pytest.mark.slow
def test_hugging_face_streams_from_a_store(store, folder, url):
    datasets = pytest.importorskip("datasets")
    assert datasets
    both = [
        dataclasses.replace(
            config_of(f"{place}/sub-2/lines.jsonl"), hf_path="json", hf_streaming=True
        )
        for place in (folder, url)
    ]
    np.testing.assert_array_equal(batches(both[0]), batches(both[1]))
