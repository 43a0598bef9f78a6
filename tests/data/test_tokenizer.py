"""Tokenizers: round trips, boundary tokens, and the text bytes that tokens encode."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from megalodon_jax.data import Tokenizer, count_bytes, load_tokenizer
from megalodon_jax.errors import DataError
from tests.data.tokenizer_files import save_json_tokenizer, save_sentencepiece

TEXTS = ["", "a", "hello  world\n", "naïve café 日本語 🙂🙂 x", "<s> plain text </s> <|endoftext|>"]


@pytest.fixture(params=["bytes", "json", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    if request.param == "json":
        return load_tokenizer(
            str(save_json_tokenizer(tmp_path / "tokenizer.json", ["<|endoftext|>"]))
        )
    return load_tokenizer(str(save_sentencepiece(tmp_path / "text.model")))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_without_boundary_tokens(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
    decoded = tokenizer.decode([tokenizer.bos_id, *ids.tolist(), tokenizer.eos_id])
    # sentencepiece's own normalization joins white space.
    if type(tokenizer).__name__ == "SentencePieceTokenizer":
        assert decoded.split() == text.split()
    else:
        assert decoded == text


@pytest.mark.parametrize("text", TEXTS)
def test_counted_bytes_add_up_to_the_text(tokenizer: Tokenizer, text: str):
    ids, num_bytes, num_tail_bytes = tokenizer.encode_counted(text)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert num_bytes.shape == ids.shape
    assert (num_bytes >= 0).all()
    assert num_bytes.sum() + num_tail_bytes == len(text.encode()) == count_bytes(text)


def test_a_token_counts_the_bytes_of_its_text(tmp_path: Path):
    tokenizer = load_tokenizer(
        str(save_json_tokenizer(tmp_path / "tokenizer.json", ["<|endoftext|>"]))
    )
    text = "hello café world"
    ids, num_bytes, _ = tokenizer.encode_counted(text)
    pieces = [len(tokenizer.decode([i]).encode()) for i in ids]
    assert num_bytes.tolist() == pieces


def test_pickling_preserves_the_tokenizer(tokenizer: Tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in TEXTS:
        np.testing.assert_array_equal(copy.encode(text), tokenizer.encode(text))
    assert copy.fingerprint() == tokenizer.fingerprint()


def test_bytes_are_the_utf8_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (257, 256, 256)
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 0x0A]
    assert tokenizer.decode(np.asarray([0x41, 0xC3])) == "A\ufffd"
    with pytest.raises(DataError, match=r"token id 257 is outside the vocabulary; use 0 to 256"):
        tokenizer.decode([65, 257])


def test_boundary_tokens_come_from_tokenizer_config_json(tmp_path: Path):
    path = save_json_tokenizer(tmp_path / "tokenizer.json", ["<s>", "</s>", "<x>"])
    plain = load_tokenizer(str(path))
    assert (plain.bos_id, plain.eos_id) == (0, 1)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<x>"}}))
    configured = load_tokenizer(str(path))
    assert (configured.bos_id, configured.eos_id) == (0, 2)
    assert configured.fingerprint() != plain.fingerprint()


def test_one_boundary_token_serves_as_both(tmp_path: Path):
    tokenizer = load_tokenizer(str(save_json_tokenizer(tmp_path / "t.json", ["<|endoftext|>"])))
    assert tokenizer.bos_id == tokenizer.eos_id == 0
    model = save_sentencepiece(tmp_path / "t.model", bos_id=-1)
    tokenizer = load_tokenizer(str(model))
    assert tokenizer.bos_id == tokenizer.eos_id >= 0


def test_a_file_without_boundary_tokens_is_rejected(tmp_path: Path):
    with pytest.raises(DataError, match=r"t\.json defines no boundary token"):
        load_tokenizer(str(save_json_tokenizer(tmp_path / "t.json", [])))
    with pytest.raises(DataError, match=r"t\.model defines no boundary token"):
        load_tokenizer(str(save_sentencepiece(tmp_path / "t.model", bos_id=-1, eos_id=-1)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, r"cannot read tokenizer .*missing\.json: No such file"),
        ("missing.model", None, r"cannot read tokenizer .*missing\.model: No such file"),
        ("bad.json", b"{}", r"bad\.json is not a tokenizer of `tokenizers`"),
        ("bad.model", b"no model", r"bad\.model is not a model of `sentencepiece`"),
        ("other.txt", b"", "use 'bytes' or the path of"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(tmp_path / name))
