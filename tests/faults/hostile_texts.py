"""Crafted tokenizer files and text files: plain, .jsonl, .gz and .parquet."""

import gzip
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.hostile import Hostile, Special, refused
from tests.faults.hostile_torch import mutations

SPECIAL: tuple[Special, ...] = ("zero", "pipe", "directory")
DEEP = "[" * 100_000
WORDS = {"<s>": 0, "</s>": 1, "Hello": 2, "w": 3, "\u00f6": 4, "rld": 5}


def tokenizer_json(**changes: Any) -> bytes:
    """A tokenizer of `tokenizers`, with some parts replaced."""
    table = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<s>"},
    }
    return json.dumps({**table, **changes}).encode()


def _unigram(vocab: Any, unk_id: Any = 0) -> dict[str, Any]:
    return {"type": "Unigram", "unk_id": unk_id, "vocab": vocab, "byte_fallback": False}


def _bpe(vocab: Any, merges: Any, **changes: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": vocab, "merges": merges, **changes}


def _tokenizers() -> list[Hostile]:
    bos_scores = [["<s>", 0.0], ["</s>", 0.0], ["a", -1.0]]
    must = {
        "empty": b"",
        "no JSON": b"hello",
        "no UTF-8": b"\xff\xfe",
        "a list": b"[]",
        "deep": DEEP.encode(),
        "deep model": b'{"model":' * 100_000,
        "no model": tokenizer_json(model=None),
        "model of no kind": tokenizer_json(model={"type": "x"}),
        "no words": tokenizer_json(model={"type": "WordLevel", "vocab": {}, "unk_token": "a"}),
        "id of 2^32": tokenizer_json(
            model={"type": "WordLevel", "vocab": {**WORDS, "x": 2**32}, "unk_token": "a"}
        ),
        "id of 2^32 - 1": tokenizer_json(
            model={"type": "WordLevel", "vocab": {**WORDS, "x": 2**32 - 1}, "unk_token": "a"}
        ),
        "negative id": tokenizer_json(
            model={"type": "WordLevel", "vocab": {**WORDS, "x": -1}, "unk_token": "a"}
        ),
        "merge of unknown words": tokenizer_json(model=_bpe(WORDS, ["a b"])),
        "merge of one word": tokenizer_json(model=_bpe(WORDS, ["a"])),
        "regex is damaged": tokenizer_json(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "((("},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "unknown id past the end": tokenizer_json(model=_unigram(bos_scores, 99)),
        "no pieces": tokenizer_json(model=_unigram([])),
        "charsmap is no base64": tokenizer_json(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "!"}
        ),
        "deep normalizer": tokenizer_json().replace(
            b'"normalizer": null',
            b'"normalizer": ' + b'{"type": "Sequence", "normalizers": [' * 20_000,
        ),
    }
    may = {
        "scores are huge": tokenizer_json(model=_unigram([[w, 1e308] for w, _ in bos_scores])),
        "unknown word absent": tokenizer_json(
            model={"type": "WordLevel", "vocab": WORDS, "unk_token": "zzz"}
        ),
        "dropout of 7": tokenizer_json(model=_bpe(WORDS, [], dropout=7.0)),
        "charsmap is short": tokenizer_json(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}
        ),
        "charsmap is damaged": tokenizer_json(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8A"}
        ),
        "added token of id 2^31": tokenizer_json(
            added_tokens=[
                {
                    "id": 2**31,
                    "content": "<x>",
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            ]
        ),
        "template of unknown token": tokenizer_json(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "q", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "backtracking": tokenizer_json(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(x+x+)+y"},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
    }
    found = [refused("tokenizers", name, text) for name, text in must.items()]
    found += [Hostile("tokenizers", name, text) for name, text in may.items()]
    found += [refused("tokenizers", name, name) for name in (*SPECIAL, "sparse")]
    for name, text in {
        "deep": DEEP,
        "a list": "[]",
        "token is a list": '{"bos_token": []}',
        "token is a number": '{"bos_token": 3}',
        "token without text": '{"eos_token": {"id": 3}, "bos_token": {"content": {}}}',
        "NUL": '{"bos_token": "<s>\0"}',
        "digits": '{"bos_token": ' + "9" * 5000 + "}",
    }.items():
        content = {"file.json": tokenizer_json(), "tokenizer_config.json": text.encode()}
        found.append(refused("tokenizers", f"boundary tokens: {name}", content))
    return found


def sentencepiece_model() -> bytes:
    """A small valid model."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world", "hostile files", "the quick brown fox"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_files(random_count: int, seed: int = 0) -> list[Hostile]:
    """Crafted tokenizer files of both kinds, and random mutations of valid ones."""
    model = sentencepiece_model()
    contents = {
        "empty": b"",
        "zeros": bytes(10_000),
        "no model": b"hello",
        "length of 2^63": b"\x0a" + b"\xff" * 9 + b"\x01",
        "length past the end": b"\x0a\x7fabc",
        "deep groups": b"\x0b" * 100_000,
        "half": model[: len(model) // 2],
        "a tokenizer.json": tokenizer_json(),
        "no pieces": b"\x12\x00",
    }
    found = _tokenizers()
    found += [refused("sentencepiece", name, content) for name, content in contents.items()]
    found += [refused("sentencepiece", name, name) for name in (*SPECIAL, "sparse")]
    found.append(Hostile("sentencepiece", "twice", model + model))
    found += mutations("tokenizers", tokenizer_json(), random_count, seed)
    return found + mutations("sentencepiece", model, random_count, seed)


def parquet(values: Any, kind: Any = None, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(values, kind)}), buffer, **settings)
    return buffer.getvalue()


def _parquet_files() -> list[Hostile]:
    good = parquet(["hello", "world"])
    must = {
        "empty": b"",
        "no parquet": b"hello",
        "only magic": b"PAR1PAR1",
        "half": good[:-20],
        "numbers": parquet([1, 2]),
        "bytes": parquet([b"\xff\xfe"]),
        "lists": parquet([["a"], ["b"]]),
        "structs": parquet([{"a": "b"}]),
        "another column": good.replace(b"text", b"tex_"),
        "footer of 4 GB": good[:-8] + b"\xff\xff\xff\xffPAR1",
        "footer of 0": good[:-8] + b"\0\0\0\0PAR1",
        "no UTF-8": parquet(
            ["hello"], use_dictionary=False, compression="none", write_statistics=False
        ).replace(b"hello", b"\xff\xfe\xff\xfe\xff"),
    }
    return [refused("parquet", name, content) for name, content in must.items()]


def text_files(random_count: int, seed: int = 0) -> list[Hostile]:
    """Crafted text files, and random mutations of valid .gz and .parquet files."""
    line = json.dumps({"text": "hello"}).encode() + b"\n"
    must = {
        ("text", "no UTF-8"): b"\xff\xfe\xff",
        ("text", "surrogate"): b"abc\xed\xa0\x80",
        ("text", "overlong NUL"): b"a\xc0\x80",
        ("text", "UTF-16"): "hello".encode("utf-16"),
        ("jsonl", "no UTF-8"): b'{"text": "\xff"}\n',
        ("jsonl", "no JSON"): b"hello\n",
        ("jsonl", "half a line"): line + line[:-5],
        ("jsonl", "deep"): DEEP.encode() + b"\n",
        ("jsonl", "digits"): b'{"text": ' + b"9" * 5000 + b"}\n",
        ("jsonl", "list"): b"[1]\n",
        ("jsonl", "number"): b'{"text": 3}\n',
        ("jsonl", "no field"): b'{"txet": "a"}\n',
        ("jsonl", "deep text"): b'{"text": ' + b'{"a":' * 50_000 + b"\n",
        ("jsonl", "UTF-16"): line.decode().encode("utf-16"),
        ("gzip", "no gzip"): b"hello",
        ("gzip", "half"): gzip.compress(b"hello" * 99)[:-12],
        ("gzip", "garbage after"): gzip.compress(b"hello") + b"hello",
        ("gzip", "wrong checksum"): gzip.compress(b"hello")[:-8] + bytes(8),
        ("gzip", "no UTF-8"): gzip.compress(b"\xff\xfe"),
    }
    may = {
        ("text", "empty"): b"",
        ("text", "NUL"): bytes(1000),
        ("text", "no line ends"): b"a" * 10**7,
        ("text", "line ends"): b"\r\n" * 10**6,
        ("text", "byte order mark"): b"\xef\xbb\xbfhello",
        ("jsonl", "empty lines"): b"\n" * 10**6,
        ("jsonl", "line of 20 MB"): json.dumps({"text": "a" * 2 * 10**7}).encode(),
        ("jsonl", "lone surrogate"): b'{"text": "\\ud800"}\n',
        ("jsonl", "null"): b'{"text": null}\n',
        ("jsonl", "key twice"): b'{"text": "a", "text": "b"}\n',
        ("gzip", "empty"): b"",
        # Streamed in constant memory, it is only a long text.
        ("gzip", "bomb of 1 GB"): b"".join([gzip.compress(bytes(10_000_000))] * 100),
        ("gzip", "many members"): gzip.compress(b"a") * 20_000,
    }
    found = [refused(kind, name, content) for (kind, name), content in must.items()]
    found += [Hostile(kind, name, content) for (kind, name), content in may.items()]
    found += [
        refused(kind, name, name) for kind in ("text", "jsonl", "parquet") for name in SPECIAL
    ]
    found += _parquet_files()
    found += mutations("gzip", gzip.compress(b"hello world " * 999), random_count // 2, seed)
    valid = parquet([f"document {i}" for i in range(99)])
    return found + mutations("parquet", valid, random_count, seed)
