"""Documents read in pieces: the ids of the whole, exact resumption inside, little memory."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalodon_jax.config import DataConfig
from megalodon_jax.data import Tokenizer, load_tokenizer, make_loader, pieces
from megalodon_jax.data.contents import FileContent, MemoryContent
from megalodon_jax.data.pieces import last_border, read_piece
from megalodon_jax.errors import DataError
from tests.data.tokenizer_files import TOKENIZER_KINDS, UNCUT_KINDS, save_tokenizer

PARTS = [
    "hello", "world", "the ", " fox ", "quick", " ", "  ", " " * 300, "\n", "\r\n", "\n\n", "\t",
    "é", "e\u0301", "日本語", "。", "🙂", "👨\u200d👩", "\u00a0", "\u2003", "\u200b", "1234", "5",
    ", ", "...", "'s", "<s>", "</s>", "ﬁ", "Ⅷ", "سلام", "\x00", "\u2581", "a\u0338",
]  # fmt: skip


def _random_texts(count: int, seed: int) -> list[str]:
    choose = random.Random(seed)
    return ["".join(choose.choices(PARTS, k=choose.randrange(1, 400))) for _ in range(count)]


def _read_pieces(text: str, tokenizer: Tokenizer, size: int) -> list[pieces.TextPiece]:
    content, found, start = MemoryContent(text.encode()), [], 0
    while not found or not found[-1].is_last:
        found.append(read_piece(content, start, tokenizer, size=size))
        assert found[-1].start == start
        start = found[-1].stop
    assert start == len(text.encode())
    return found


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_pieces_have_the_ids_of_the_whole(tmp_path: Path, kind: str):
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, kind)))
    num_pieces = 0
    for text in _random_texts(40, seed=1):
        found = _read_pieces(text, tokenizer, size=512)
        ids = np.concatenate([tokenizer.encode(piece.text) for piece in found])
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        num_pieces += len(found)
    assert (num_pieces == 40) == (kind in UNCUT_KINDS)


def test_bytes_are_cut_between_characters():
    tokenizer = load_tokenizer("bytes")
    for text in _random_texts(40, seed=2):
        found = _read_pieces(text, tokenizer, size=7)
        assert "".join(piece.text for piece in found) == text
        assert max(piece.stop - piece.start for piece in found) <= 7


def test_last_border():
    content = "aé日🙂b".encode()
    borders = [0, 1, 3, 6, 10, 11]
    for size in range(4, len(content)):
        assert last_border(content, size) == max(b for b in borders if b <= size)


@pytest.mark.parametrize("kind", ["bytes", "byte_level", "sentencepiece", "prepend"])
@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_batches_do_not_depend_on_the_pieces(tmp_path: Path, monkeypatch, kind: str, packing: str):
    """Targets and counted bytes of documents cut into pieces, and resumption inside of them."""
    spec = "bytes" if kind == "bytes" else str(save_tokenizer(tmp_path, kind))
    tokenizer = load_tokenizer(spec)
    texts = [*_random_texts(3, seed=3), "", "x", "日本語 " * 200]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(
        files=(str(path),), seq_len=24, batch_size=2, heldout_files=(str(path),),
        packing=packing,  # type: ignore[arg-type]
    )  # fmt: skip
    loader = make_loader(config, tokenizer, "heldout", repeat=False)
    whole = list(loader.with_bytes())
    monkeypatch.setattr(pieces, "PIECE_BYTES", 300)
    cut = make_loader(config, tokenizer, "heldout", repeat=False)
    states, found = [], []
    for counted in cut.with_bytes():
        found.append(counted)
        states.append(json.dumps(cut.state_dict()))
    for expected, batch in zip(whole, found, strict=True):
        for a, b in zip(expected.batch, batch.batch, strict=True):
            np.testing.assert_array_equal(a, b)
    num_bytes = [sum(counted.num_bytes for counted in run) for run in (whole, found)]
    assert num_bytes == [sum(len(text.encode()) for text in texts)] * 2
    for step in range(0, len(states) - 1, 5):
        cut.load_state_dict(json.loads(states[step]))
        resumed = list(itertools.islice(cut.with_bytes(), 3))
        for expected, batch in zip(found[step + 1 : step + 4], resumed, strict=True):
            assert expected.num_bytes == batch.num_bytes
            for a, b in zip(expected.batch, batch.batch, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_bad_byte_of_a_long_file_is_named_by_its_place(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64)
    (tmp_path / "a.txt").write_bytes(b"x" * 1000 + b"\xff" + b"y" * 100)
    config = DataConfig(files=(str(tmp_path / "a.txt"),), seq_len=8, heldout_fraction=0.0)
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 text \(byte 1000 is 0xff\)"):
        list(make_loader(config, load_tokenizer("bytes"), "train", repeat=False))


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    content = FileContent(tmp_path / "a.txt", 0, 9)
    with pytest.raises(DataError, match=r"a\.txt has become shorter"):
        content.read(0, 9)


MEMORY_SCRIPT = """
import json, sys, time
import grain, numpy as np, pyarrow.parquet
from megalodon_jax.config import DataConfig
from megalodon_jax.data import load_tokenizer, make_loader

def megabytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

config = DataConfig(files=(sys.argv[1],), tokenizer=sys.argv[2], seq_len=2048, batch_size=4)
tokenizer = load_tokenizer(config.tokenizer)
before = megabytes("VmRSS")
seconds = []
def timed(loader, state=None):
    start = time.monotonic()
    if state is not None:
        loader.load_state_dict(state)
    batch = next(loader)
    seconds.append(time.monotonic() - start)
    return batch
loader = make_loader(config, tokenizer, "train", repeat=True)
timed(loader)
for _ in range(int(sys.argv[3])):
    next(loader)
state = json.loads(json.dumps(loader.state_dict()))
expected = next(loader)
loader.close()
again = make_loader(config, tokenizer, "train", repeat=True)
resumed = timed(again, state)
again.close()
assert all(np.array_equal(a, b) for a, b in zip(expected, resumed))
next(make_loader(config, tokenizer, "heldout", repeat=False).with_bytes())
print(json.dumps({"megabytes": megabytes("VmHWM") - before, "seconds": seconds}))
"""


def _measure(path: Path, tokenizer: str, steps: int) -> dict:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(path), tokenizer, str(steps)],
        cwd=root, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "byte_level", "parquet"])
def test_memory_does_not_depend_on_the_size_of_the_text(tmp_path: Path, kind: str):
    paragraph = "".join(f"line {i} of some text, é日本語\n" for i in range(30_000))
    path = tmp_path / "long.txt"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        # One row group, of several blocks.
        path = tmp_path / "long.parquet"
        rows = [f"{i} {paragraph[:3000]}" for i in range(20_000)]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    else:
        path.write_text(paragraph * 60)
        assert path.stat().st_size > 60e6
    spec = str(save_tokenizer(tmp_path, kind)) if kind == "byte_level" else "bytes"
    # 20 million bytes of text, or a few windows of tokens.
    measured = _measure(path, spec, 300 if kind == "byte_level" else 2500)
    # Parquet took 149 to 152 in five runs (pages of a row group), the others less. 31 bytes a byte
    # of text, as before documents were read in pieces, would be 1,900.
    assert measured["megabytes"] < (170 if kind == "parquet" else 150)
    assert max(measured["seconds"]) < 10
