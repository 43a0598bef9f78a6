"""A tokenizer with one distinct token per word, and small files of documents for it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megalodon_jax.config import DataConfig
from megalodon_jax.data import CountedTokens
from megalodon_jax.data.pieces import TextCut


class NumberTokenizer:
    """Every integer of a text is a token, so that a lost or repeated token is detected."""

    bos_id = 0
    eos_id = 0
    vocab_size = 100_000

    def encode(self, text: str) -> np.ndarray:
        return np.asarray([int(word) for word in text.split()], dtype=np.int32)

    def encode_counted(self, text: str) -> CountedTokens:
        ids = self.encode(text)
        return CountedTokens(ids, np.asarray([len(str(i)) + 1 for i in ids], dtype=np.int32), 0)

    def find_cut(self, text: str) -> TextCut | None:
        return TextCut(cut, cut) if (cut := text.rfind(" ")) > 0 else None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join(str(i) for i in ids if i)

    def fingerprint(self) -> str:
        return "numbers"

    def files(self) -> dict[str, bytes]:
        return {}


@pytest.fixture
def numbers() -> NumberTokenizer:
    return NumberTokenizer()


@pytest.fixture
def number_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """Makes a configuration of documents of given lengths with consecutive numbers from 1."""

    def make(lengths: Sequence[int], **settings: object) -> DataConfig:
        path = tmp_path / "numbers.jsonl"
        starts = np.cumsum([1, *lengths])
        texts = [
            " ".join(map(str, range(start, start + length)))
            for start, length in zip(starts[:-1], lengths, strict=True)
        ]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        defaults = {"source": "files", "files": (str(path),), "heldout_fraction": 0.0}
        defaults |= {"seq_len": 8, "batch_size": 4, "shuffle_seed": 3}
        return DataConfig(**{**defaults, **settings})  # type: ignore[arg-type]

    return make
