"""Tokenizer files of many kinds, trained on a few words."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

CORPUS = [
    "hello world, how are you? é日本語 café",
    "the quick brown fox jumps over the lazy dog",
] * 20
# The pattern of Llama 3 and GPT-4: line breaks may join punctuation, digits come in threes.
_THREE_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}
# Normalizer, pre-tokenizer, whether all bytes are in the alphabet.
_KINDS: dict[str, tuple[Any, Any, bool]] = {
    "byte_level": (None, _BYTE_LEVEL, True),
    "prefix_space": (None, pre_tokenizers.ByteLevel(add_prefix_space=True), True),
    "three_digits": (
        None,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_THREE_DIGITS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        True,
    ),
    "metaspace": (None, pre_tokenizers.Metaspace(), False),
    "nfc": (normalizers.NFC(), _BYTE_LEVEL, True),
    "strip": (normalizers.Strip(), _BYTE_LEVEL, True),
    "no_words": (None, None, False),
    "prepend": (None, pre_tokenizers.Metaspace(), False),
}
_PIECES = {
    "sentencepiece": {},
    "identity": {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    "no_prefix": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "suffix": {"treat_whitespace_as_suffix": True},
}
TOKENIZER_KINDS = (*_KINDS, *_PIECES)
# These tokenizers have no cut that is known to be safe: a document is encoded whole.
UNCUT_KINDS = ("strip", "suffix")


def save_json_tokenizer(path: Path, special: Sequence[str], kind: str = "byte_level") -> Path:
    """A BPE file of the `tokenizers` library that cuts texts off and pads them, if it may."""
    normalizer, pre_tokenizer, all_bytes = _KINDS[kind]
    tokenizer = RustTokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if all_bytes else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "byte_level":
        from tokenizers import decoders

        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    if kind == "prepend":
        # As in files converted from sentencepiece: spaces are replaced before, words not split.
        table = json.loads(path.read_text())
        path.write_text(json.dumps({**table, "pre_tokenizer": None, "normalizer": _PREPEND}))
    return path


def save_sentencepiece(path: Path, **settings: Any) -> Path:
    """A BPE model of the `sentencepiece` library."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=330, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, model_type="bpe", **settings,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def save_tokenizer(directory: Path, kind: str) -> Path:
    """A tokenizer file of one of `TOKENIZER_KINDS`."""
    if kind in _KINDS:
        return save_json_tokenizer(directory / f"{kind}.json", ["<s>", "</s>"], kind)
    return save_sentencepiece(directory / f"{kind}.model", **_PIECES[kind])
