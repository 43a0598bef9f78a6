"""Training of tokenizers: files that the loader reads, and round trips of any text."""

import random
from pathlib import Path

import numpy as np
import pytest

from megalodon_jax.cli.main import main
from megalodon_jax.config import DataConfig
from megalodon_jax.data import load_tokenizer, make_loader
from megalodon_jax.data.train_tokenizer import TokenizerLibrary, train_tokenizer
from megalodon_jax.errors import ConfigError

TEXT = "".join(f"line {i}: the quick brown fox jumps over {i} lazy dogs\n" for i in range(400))
RANGES = ((0, 0x80), (0x20, 0x7F), (0x80, 0x300), (0x300, 0xD800), (0xE000, 0x110000), (0x20, 0x21))


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def _any_texts(count: int) -> list[str]:
    choose = random.Random(0)
    return [
        "".join(chr(choose.randrange(*choose.choice(RANGES))) for _ in range(choose.randrange(60)))
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("library", "name"), [("tokenizers", "t.json"), ("sentencepiece", "t.model")]
)
def test_a_trained_tokenizer_encodes_any_text(
    text_path: Path, tmp_path: Path, library: TokenizerLibrary, name: str
):
    size = train_tokenizer([str(text_path)], tmp_path / name, vocab_size=350, library=library)
    tokenizer = load_tokenizer(str(tmp_path / name))
    assert tokenizer.vocab_size == size <= 350
    assert tokenizer.bos_id != tokenizer.eos_id
    # Words of the text are tokens.
    assert len(tokenizer.encode(TEXT)) < 0.5 * len(TEXT)
    for text in [TEXT, *_any_texts(200)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    config = DataConfig(
        files=(str(text_path),), tokenizer=str(tmp_path / name), seq_len=32, heldout_fraction=0.0
    )
    loader = make_loader(config, tokenizer, "train", repeat=False)
    targets = np.concatenate([batch.targets[batch.weights > 0] for batch in loader])
    assert tokenizer.decode(targets) == TEXT


def test_the_command(text_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out" / "tokenizer.json"
    command = ["tokenizer", "train", str(text_path), "--vocab_size", "300", "--output", str(output)]
    assert main(command) == 0
    assert "300 ids; set data.tokenizer to this path" in capsys.readouterr().out
    assert main(command) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_a_share_of_every_document_is_read(tmp_path: Path):
    # Only the starts of the two documents: the word at their ends is no token.
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("first " * 60_000 + "last " * 60_000)
    train_tokenizer([str(tmp_path)], tmp_path / "t.json", vocab_size=270, max_bytes=100_000)
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert len(tokenizer.encode(" first")) == 1
    assert len(tokenizer.encode(" last")) > 1


@pytest.mark.parametrize(
    ("output", "settings", "message"),
    [
        ("t.model", {}, r"output is .*; a file of `tokenizers` ends in \.json"),
        ("t.json", {"library": "sentencepiece"}, r"a file of `sentencepiece` ends in \.model"),
        ("t.json", {"vocab_size": 256}, "vocab_size is 256; must be more than 259"),
    ],
)
def test_wrong_settings_are_refused(text_path: Path, tmp_path: Path, output, settings, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer([str(text_path)], tmp_path / output, **{"vocab_size": 300, **settings})
    assert not (tmp_path / output).exists()
