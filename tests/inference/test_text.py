"""Incremental text against decoding everything at once, and stop strings against a whole search."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from megalodon_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megalodon_jax.inference.text import StopStrings, TextStream
from tests.data.tokenizer_files import TOKENIZER_KINDS, save_tokenizer

TEXTS = [
    "hello world, how are you? é日本語 café 👩‍👩‍👧 the lazy dog",
    "  two  leading spaces\n\n\n and lines \t\n",
    "\ufffd literal \ufffd\ufffd replacement",
    "日本語" * 30,
    "",
    " ",
]
# Decoders of published tokenizer files, on a vocabulary of pieces, bytes and words.
LLAMA = decoders.Sequence(
    [
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)  # fmt: skip
DECODERS = {
    "llama": LLAMA,
    "byte_fallback": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace_decoder": decoders.Metaspace(),
    "word_piece": decoders.WordPiece(),
    "bpe_suffix": decoders.BPEDecoder(suffix="</w>"),
    "none": None,
}


def save_decoder(directory: Path, kind: str) -> Path:
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["a", "b", "ab", " ", "\u2581", "\u2581a", "\u2581\u2581", "b</w>", "##b", "."]
    pieces += ["'", "n't", "\ufffd", "é", "日", "\n", "a</w>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = RustTokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    if DECODERS[kind] is not None:
        tokenizer.decoder = DECODERS[kind]
    path = directory / f"{kind}.json"
    tokenizer.save(str(path))
    return path


def stream(tokenizer: Tokenizer, ids: list[int], sizes: itertools.cycle) -> list[str]:
    text, texts, start = TextStream(tokenizer), [], 0
    while start < len(ids):
        size = next(sizes)
        texts.append(text.feed(ids[start : start + size]))
        start += size
    return [*texts, text.close()]


def check(tokenizer: Tokenizer, ids: list[int]) -> None:
    for sizes in ([1], [2, 1, 5]):
        joined = "".join(stream(tokenizer, ids, itertools.cycle(sizes)))
        assert joined == tokenizer.decode(ids), ids


BYTE_KINDS = ["bytes", "sentencepiece", "identity", "no_prefix", "suffix", *DECODERS]


def make_tokenizer(kind: str, directory: Path) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    save = save_tokenizer if kind in TOKENIZER_KINDS else save_decoder
    return load_tokenizer(str(save(directory, kind)))


@pytest.fixture(scope="module", params=["bytes", *TOKENIZER_KINDS, *DECODERS])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return make_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer"))


def test_joined_texts_equal_decoding_everything(tokenizer):
    for text in TEXTS:
        check(tokenizer, tokenizer.encode(text).tolist())


def test_ids_that_no_text_encodes_to(tokenizer):
    rng = np.random.default_rng(0)
    for length in [1, 2, 3, *[40] * 20]:
        check(tokenizer, rng.integers(0, tokenizer.vocab_size, length).tolist())
    # Long runs of few tokens: invalid bytes, leading spaces, boundary tokens.
    for _ in range(30):
        few = rng.integers(0, tokenizer.vocab_size, 3)
        check(tokenizer, rng.choice(few, 200).tolist())
    check(tokenizer, [tokenizer.bos_id] * 5 + tokenizer.encode(" a b").tolist())


def test_tokens_without_text_do_not_start_a_new_text(tokenizer):
    words, every_id = tokenizer.encode("ab ab").tolist(), range(tokenizer.vocab_size)
    skipped = [i for i in every_id if tokenizer.decode([*words, i]) == tokenizer.decode(words)]
    for token in skipped:
        check(tokenizer, [*words, *[token] * 9, *words, token, *words])


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_runs_of_bytes(kind, tmp_path):
    rng = np.random.default_rng(1)
    tokenizer = make_tokenizer(kind, tmp_path)
    # Pieces 0 to 2 are control tokens in the others.
    byte_ids = list(range(256)) if kind == "bytes" else list(range(3, 259))
    other = tokenizer.encode("a b").tolist()
    for _ in range(30):
        text = "".join(rng.choice(list("é日👩a\ufffd"), 12)).encode()
        content = [byte_ids[byte] for byte in text]
        for place in rng.integers(0, len(content), rng.integers(0, 4)):
            content[place : place + 1] = rng.choice([*byte_ids, *other], 2).tolist()
        check(tokenizer, content)
        check(tokenizer, [*other, *content, *other])
    check(tokenizer, [byte_ids[0xFF]] * 300)
    check(tokenizer, [byte_ids[0xF0], byte_ids[0x9F]] * 150)
    check(tokenizer, [byte_ids[0x0A]] * 300)


class Counting:
    """A tokenizer that counts the ids that it decodes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids):
        self.decoded += len(ids)
        return self._tokenizer.decode(ids)


def test_the_cost_is_linear(tokenizer):
    ids = tokenizer.encode("the quick brown fox, " * 400).tolist()
    for tokens in (ids[:2_000], ids[:1] * 2_000):
        counting = Counting(tokenizer)
        stream(counting, tokens, itertools.cycle([1]))
        assert counting.decoded < 40 * len(tokens)


def test_invalid_bytes_cost_is_linear():
    counting = Counting(ByteTokenizer())
    stream(counting, [0xFF] * 5_000, itertools.cycle([1]))
    assert counting.decoded < 200 * 5_000


def test_text_comes_as_soon_as_its_characters_are_complete():
    texts = stream(ByteTokenizer(), list("aé👩b".encode()), itertools.cycle([1]))
    assert texts == ["a", "", "é", "", "", "", "👩", "b", ""]


def first_end(text: str, stops: list[str]) -> tuple[str, str | None, int]:
    """Text before the first stop string, the stop string, and the characters up to its end."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop, end
    return text, None, len(text)


@pytest.mark.parametrize(
    "stops", [["ab"], ["aab", "b"], ["abab", "ba"], ["aaa"], ["c", "abc", "bc"], ["\n\n", "x"], []]
)
def test_stop_strings_in_any_division_of_the_text(stops):
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("abc\n"), rng.integers(0, 20)))
        borders = np.sort(rng.integers(0, len(text) + 1, rng.integers(0, 8)))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *borders.tolist(), len(text)])]
        expected, stop, end = first_end(text, stops)
        search, output, match = StopStrings(stops), "", None
        for piece in pieces:
            match = search.feed(piece)
            output += match.text
            # Nothing is given out that a stop string could still take back.
            assert expected.startswith(output)
            if match.stop is not None:
                break
        assert match is not None
        assert match.stop == stop
        if stop is None:
            assert output + search.close() == text
        else:
            assert output == expected
            ends = np.cumsum([len(piece) for piece in pieces])
            assert match.num_tokens == 1 + int(np.argmax(ends >= end))


def test_only_what_may_begin_a_stop_string_is_held_back():
    search = StopStrings(["END"])
    assert [search.feed(text).text for text in ("abE", "N", "x", "E")] == ["ab", "", "ENx", ""]
    assert search.close() == "E"
    with pytest.raises(ValueError, match="at least one character"):
        StopStrings([""])


def test_a_search_ends_at_its_stop_string():
    search = StopStrings(["x"])
    assert search.feed("axb") == ("a", "x", 1)
    with pytest.raises(ValueError, match="ended at the stop string 'x'"):
        search.feed("c")
