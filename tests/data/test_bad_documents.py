"""Documents that cannot be read: named, or left out and counted."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from megalodon_jax.config import DataConfig
from megalodon_jax.data import Tokenizer, load_tokenizer, make_loader, pieces, pipeline, reader
from megalodon_jax.errors import DataError


def _config(path: Path, **settings: object) -> DataConfig:
    defaults = {"files": (str(path),), "heldout_fraction": 0.0, "seq_len": 8, "batch_size": 2}
    return DataConfig(**{**defaults, **settings})  # type: ignore[arg-type]


@pytest.fixture
def with_bad_lines(tmp_path: Path) -> Path:
    """Documents 1 to 40, of which every seventh is broken."""
    lines = [json.dumps({"text": f"{i} {i + 100}"}) for i in range(1, 41)]
    lines = ["{broken" if i % 7 == 0 else line for i, line in enumerate(lines)]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_stop_names_the_document_and_the_way_out(with_bad_lines: Path, numbers: Tokenizer):
    with pytest.raises(
        DataError, match=r"lines\.jsonl:1: not a line of JSON.*data\.on_bad_document = 'skip'"
    ):
        next(make_loader(_config(with_bad_lines), numbers, "train", repeat=True))


def test_skip_leaves_out_and_counts(with_bad_lines: Path, numbers: Tokenizer, monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_TOKENS", 3 * 8)
    config = _config(with_bad_lines, on_bad_document="skip")
    loader = make_loader(config, numbers, "train", repeat=True)
    states, counts, batches, found = [], [], [], []
    for _ in range(30):
        states.append(json.dumps(loader.state_dict()))
        counts.append(loader.bad_documents)
        batches.append(next(loader))
        found += batches[-1].targets[batches[-1].weights > 0].tolist()
    good = {i + 1 for i in range(40) if i % 7} | {i + 101 for i in range(40) if i % 7}
    assert set(found) - {0} == good
    # Six an epoch of 34 · 3 targets.
    assert counts[-1] == pytest.approx(6 * len(found) / 102, abs=6)
    resumed = make_loader(config, numbers, "train", repeat=True)
    for step in (0, 3, 4, 5, 17, 26):
        resumed.load_state_dict(json.loads(states[step]))
        for i in range(step, step + 3):
            assert resumed.bad_documents == counts[i]
            for a, b in zip(next(resumed), batches[i], strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_run_goes_on_with_skip_where_it_stopped(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_TOKENS", 3 * 8)
    texts = [f"document {i} " * 3 for i in range(20)]
    path = tmp_path / "texts.txt"
    path.write_bytes(b"\0".join(t.encode() for t in texts[:10]) + b"\0\xff\0" + texts[11].encode())
    config = _config(path, document_separator="\0")
    loader = make_loader(config, load_tokenizer("bytes"), "train", repeat=True)
    stopped: list = []
    with pytest.raises(DataError, match=r"texts\.txt, document 10: not UTF-8"):
        stopped.extend(loader)
    state = loader.state_dict()
    loader.close()
    skipping = make_loader(
        _config(path, document_separator="\0", on_bad_document="skip"),
        load_tokenizer("bytes"), "train", repeat=True,
    )  # fmt: skip
    whole = list(itertools.islice(skipping, len(stopped) + 20))
    skipping.load_state_dict(state)
    for i in range(len(stopped), len(stopped) + 20):
        for a, b in zip(next(skipping), whole[i], strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_long_document_ends_before_its_bad_piece(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"0123456789abcdef\xffxyz")
    config = _config(tmp_path / "a.txt", on_bad_document="skip")
    loader = make_loader(config, load_tokenizer("bytes"), "train", repeat=False)
    targets = np.concatenate([batch.targets[batch.weights > 0] for batch in loader])
    assert targets.tolist() == [*b"0123456789", 256]
    assert loader.bad_documents == 1


def test_only_bad_documents_are_an_error(tmp_path: Path, monkeypatch, numbers: Tokenizer):
    monkeypatch.setattr(reader, "MAX_BAD_IN_A_ROW", 50)
    path = tmp_path / "a.jsonl"
    path.write_text("{bad\n" * 3)
    with pytest.raises(DataError, match="the 3 documents of split 'train' have no token"):
        make_loader(_config(path, on_bad_document="skip"), numbers, "train", repeat=True)
    path.write_text('{"text": "1 2 3"}\n')
    loader = make_loader(_config(path, on_bad_document="skip"), numbers, "train", repeat=True)
    path.write_text('{"text: "1 2 3"}\n')
    with pytest.raises(DataError, match=r"50 documents in a row cannot be read; .*a\.jsonl:1"):
        list(loader)
    loader.close()
