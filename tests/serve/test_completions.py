"""Completions and chats through OpenAI's client, against the engine without a server."""

import pytest

from megalodon_jax.data import ByteTokenizer
from megalodon_jax.data.chat_template import ChatTemplate, Message
from megalodon_jax.generate import generate_text, text_request
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling_params import SamplingParams
from tests.serve.conftest import MODEL

TOKENIZER = ByteTokenizer()


def test_completion_is_that_of_generate(client, tiny_model):
    answer = client.completions.create(
        model=MODEL, prompt="def ", max_tokens=11, temperature=0.8, top_p=0.9, seed=5
    )
    params = SamplingParams(max_tokens=11, temperature=0.8, top_p=0.9, seed=5)
    (expected,) = generate_text(tiny_model, TOKENIZER, ["def "], params)
    choice = answer.choices[0]
    assert choice.text == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == 5 + len(expected.tokens)


def test_token_ids_are_taken_as_they_are(client, direct):
    prompt = [256, 7, 9, 250]
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0)
    params = SamplingParams(max_tokens=6, temperature=0.0, stop_ids=(256,))
    stream = direct.submit(Request(prompt=prompt, params=params))
    stream.result()
    assert answer.choices[0].text == stream.text
    assert answer.usage.prompt_tokens == 4


def test_pieces_of_a_stream_join_to_the_whole(client):
    fields = {"model": MODEL, "prompt": "abc", "max_tokens": 40, "seed": 3}
    whole = client.completions.create(**fields)
    chunks = list(
        client.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    assert len(chunks) > 3
    *parts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in parts) == whole.choices[0].text
    reasons = [chunk.choices[0].finish_reason for chunk in parts]
    assert reasons == [None] * (len(parts) - 1) + [whole.choices[0].finish_reason]
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in parts)
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_prompts_and_samples(client, direct):
    answer = client.completions.create(
        model=MODEL, prompt=["ab", "xyz"], n=2, max_tokens=7, temperature=1.0, seed=11
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    params = SamplingParams(max_tokens=7, seed=11)
    expected = []
    for prompt in ("ab", "xyz"):
        samples = direct.submit_samples(text_request(TOKENIZER, prompt, params), 2)
        direct.run()
        expected += [sample.text for sample in samples]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == 3 + 4


def test_stop_string_across_tokens(client):
    fields = {"model": MODEL, "prompt": "abc", "max_tokens": 60, "seed": 4, "temperature": 1.0}
    whole = client.completions.create(**fields).choices[0].text
    # Bytes are tokens: this stop string begins in one token and ends in another.
    start = next(i for i in range(8, len(whole) - 3) if whole[i : i + 3].isascii())
    stop = whole[start : start + 3]
    answer = client.completions.create(**fields, stop=[stop, "never"], logprobs=0)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: whole.find(stop)]
    assert answer.usage.completion_tokens == len(choice.logprobs.tokens)
    pieces = list(client.completions.create(**fields, stop=stop, logprobs=0, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text
    tokens = [token for piece in pieces for token in piece.choices[0].logprobs.tokens]
    assert tokens == choice.logprobs.tokens


def test_logprobs_of_completions_and_echo(client, direct):
    answer = client.completions.create(
        model=MODEL, prompt="def ", max_tokens=5, temperature=0, logprobs=3, echo=True
    )
    params = SamplingParams(max_tokens=5, temperature=0.0, logprobs=3, stop_ids=(256,))
    request = Request(prompt=[256, *b"def "], params=params, prompt_logprobs=3)
    stream = direct.submit(request)
    stream.result()
    found = answer.choices[0].logprobs
    assert answer.choices[0].text == "def " + stream.text
    entries = [*stream.prompt_logprobs[1:], *stream.logprobs]
    assert found.token_logprobs == pytest.approx([entry.token for entry in entries], abs=1e-5)
    assert found.tokens[:4] == ["d", "e", "f", " "]
    assert found.text_offset[:5] == [0, 1, 2, 3, 4]
    for top, entry in zip(found.top_logprobs, entries, strict=True):
        assert max(top.values()) == pytest.approx(entry.top[0][1], abs=1e-5)
        assert 3 <= len(top) <= 4
    scored = client.completions.create(
        model=MODEL, prompt="def ", max_tokens=0, logprobs=3, echo=True
    )
    assert scored.choices[0].text == "def "
    assert scored.choices[0].logprobs.token_logprobs == found.token_logprobs[:4]
    assert scored.usage.completion_tokens == 0


def test_chat(client, direct):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    fields = {"model": MODEL, "messages": messages, "max_completion_tokens": 12, "seed": 2}
    answer = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    template = ChatTemplate.load("plain")
    prompt = template.encode(TOKENIZER, [Message("system", "Be short."), Message("user", "Hi")])
    assert bytes(prompt[1:].tolist()) == b"System: Be short.\nUser: Hi\nAssistant:"
    params = SamplingParams(max_tokens=12, seed=2, stop_ids=(256,), stop=template.stop, logprobs=2)
    stream = direct.submit(Request(prompt=prompt, params=params))
    stream.result()
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == stream.text
    assert choice.finish_reason == stream.finish_reason
    content = choice.logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(
        [entry.token for entry in stream.logprobs], abs=1e-5
    )
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    ascii_tokens = [entry for entry in content if entry.bytes is not None]
    assert all(bytes(entry.bytes).decode() == entry.token for entry in ascii_tokens)

    chunks = list(client.chat.completions.create(**fields, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == stream.text
    assert chunks[-1].choices[0].finish_reason == stream.finish_reason


def test_fields_of_sampling_reach_the_engine(client, direct):
    answer = client.completions.create(
        model=MODEL,
        prompt="q",
        max_tokens=9,
        seed=8,
        temperature=1.3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"65": 100, "66": 99.5},
        extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2},
    )
    params = SamplingParams(
        max_tokens=9, seed=8, temperature=1.3, presence_penalty=0.5, frequency_penalty=-0.5,
        logit_bias={65: 100.0, 66: 99.5}, top_k=5, min_p=0.01, repetition_penalty=1.2,
    )  # fmt: skip
    stream = direct.submit(text_request(TOKENIZER, "q", params))
    stream.result()
    assert answer.choices[0].text == stream.text
    assert set(answer.choices[0].text) <= {"A", "B"}


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
