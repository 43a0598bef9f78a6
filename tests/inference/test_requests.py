"""Streams of requests: text, tokens and end, against a search in the whole text."""

import numpy as np
import pytest

from megalodon_jax.data import ByteTokenizer, load_tokenizer
from megalodon_jax.inference.requests import Request, Stream, TokenLogprobs
from megalodon_jax.inference.sampling import SamplingParams
from tests.data.tokenizer_files import save_json_tokenizer

TEXT = "the lazy dog jumps over 日本語, and the fox é, too"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_json_tokenizer(path, ["<s>", "</s>"])
    return {"bytes": ByteTokenizer(), "bpe": load_tokenizer(str(path))}


def make_stream(tokenizer, tokens=(), **params) -> Stream:
    """A stream whose engine draws these tokens, one a step."""
    drawn = iter(list(tokens))

    def step() -> None:
        token = next(drawn)
        stream.add(token, TokenLogprobs(-1.0, ()), is_valid=True)

    request = Request(prompt=[0], params=SamplingParams(**{"max_tokens": 1000, **params}))
    stream = Stream(request, 0, step, tokenizer)
    return stream


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_stop_string_ends_text_and_tokens(kind, tokenizers):
    """Every text of one to five characters that occurs in the text, as the stop."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(TEXT).tolist()
    assert (len(ids) < len(TEXT.encode())) == (kind == "bpe")
    for start in range(0, len(TEXT), 3):
        for length in range(1, 6):
            stop = TEXT[start : start + length]
            stream = make_stream(tokenizer, ids, stop=(stop, "\0"))
            pieces = list(stream.iterate_text())
            before = TEXT[: TEXT.index(stop)]
            assert "".join(pieces) == stream.text == before
            assert stream.finish_reason == "stop"
            assert len(stream.logprobs) == len(stream.tokens)
            # The fewest tokens that have the whole text before the stop.
            assert tokenizer.decode(stream.tokens).startswith(before)
            assert not tokenizer.decode(stream.tokens[:-1]).startswith(before) or not before
            assert stream.tokens == ids[: len(stream.tokens)]
            if kind == "bytes":
                assert tokenizer.decode(stream.tokens) == before


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_comes_as_soon_as_it_is_certain(kind, tokenizers):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(TEXT).tolist()
    stream = make_stream(tokenizer, ids, max_tokens=len(ids), stop=("jumps high",))
    shown = []
    while not stream.is_finished:
        stream._step()
        shown.append(stream.text)
        assert TEXT.startswith(stream.text)
    assert stream.finish_reason == "length"
    assert shown[-1] == TEXT
    # The beginning of a stop string is held back, and so is an incomplete character.
    held = {text for text in shown if text.endswith("dog ")}
    assert held == {"the lazy dog "} if kind == "bytes" else held <= {"the lazy dog "}
    assert len(set(shown)) > len(ids) // 2


def test_text_at_the_end_that_begins_a_stop_is_part_of_it(tokenizers):
    tokenizer = tokenizers["bytes"]
    stream = make_stream(tokenizer, b"go on", max_tokens=5, stop=("on and",))
    assert "".join(stream.iterate_text()) == "go on"
    assert bytes(stream.tokens) == b"go on"
    cancelled = make_stream(tokenizer, b"go o", stop=("on and",))
    for _ in range(4):
        cancelled._step()
    assert cancelled.text == "go "
    cancelled.finish("cancelled")
    assert (cancelled.text, cancelled.finish_reason) == ("go o", "cancelled")


def test_the_stop_id_is_not_a_token(tokenizers):
    stream = make_stream(tokenizers["bytes"], [65, 66, 256, 67], stop_ids=(256,))
    assert list(stream) == [65, 66] == stream.tokens
    assert (stream.text, stream.finish_reason) == ("AB", "stop")


def test_streams_without_a_tokenizer_have_tokens_alone():
    stream = make_stream(None, [5, 6, 7], max_tokens=3)
    assert stream.result() == [5, 6, 7]
    with pytest.raises(ValueError, match="no tokenizer"):
        _ = stream.text
    with pytest.raises(ValueError, match="no tokenizer"):
        next(stream.iterate_text())


def test_scores_that_are_not_numbers_end_a_stream(tokenizers):
    stream = make_stream(tokenizers["bytes"], [65])
    stream._step()
    stream.add(0, None, is_valid=False)
    assert (stream.tokens, stream.finish_reason) == ([65], "invalid")


@pytest.mark.slow
def test_long_streams_take_linear_time(tokenizers):
    """A stop string and text, for a hundred thousand tokens."""
    ids = np.random.default_rng(0).integers(97, 123, 100_000).tolist()
    stream = make_stream(tokenizers["bytes"], ids, max_tokens=len(ids), stop=("Z", "stop here"))
    assert sum(map(len, stream.iterate_text())) == len(ids)
