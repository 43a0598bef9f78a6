"""Sessions of the server: continued, bound to a key, kept on disk, used by one call at a time."""

import time

import openai
import pytest

from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling_params import SamplingParams
from tests.serve.conftest import (
    KEYS,
    MAX_ANSWER,
    MODEL,
    client_of,
    make_test_engine,
    running,
    settings,
)

GREEDY = {"model": MODEL, "max_tokens": 9, "temperature": 0}


def continue_text(client, session: str, prompt: str, **fields):
    return client.completions.create(
        **GREEDY | fields, prompt=prompt, extra_body={"session": session}
    )


@pytest.mark.parametrize("is_streaming", [False, True])
@pytest.mark.slow
def test_a_continued_session_is_one_long_prompt(client, direct, is_streaming):
    def turn(session: str, prompt: str):
        if not is_streaming:
            answer = continue_text(client, session, prompt, logit_bias=no_end)
            return answer.session, answer.choices[0].text, answer.usage.prompt_tokens
        chunks = list(
            continue_text(
                client,
                session,
                prompt,
                stream=True,
                logit_bias=no_end,
                stream_options={"include_usage": True},
            )
        )
        text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
        return chunks[0].session, text, chunks[-1].usage.prompt_tokens

    no_end = {"256": -100}
    session, _, _ = turn("new", "What is")
    params = SamplingParams(
        max_tokens=9, temperature=0.0, stop_ids=(256,), logit_bias={256: -100.0}
    )
    first = direct.submit(Request(prompt=[256, *b"What is"], params=params))
    first.result()
    same, text, num_prompt_tokens = turn(session, " that?")
    whole = [256, *b"What is", *first.tokens, *b" that?"]
    second = direct.submit(Request(prompt=whole, params=params))
    second.result()
    assert same == session
    assert len(session) == 32
    assert text == second.text
    assert num_prompt_tokens == len(" that?")


@pytest.mark.slow
def test_a_chat_session_feeds_only_the_new_message(client, direct):
    def turn(session: str, content: str):
        return client.chat.completions.create(
            **GREEDY | {"max_tokens": 20},
            messages=[{"role": "user", "content": content}],
            logprobs=True,
            extra_body={"session": session},
        )

    first = turn("new", "one")
    second = turn(first.session, "two")
    stop = ("\nUser:", "\nSystem:")
    params = SamplingParams(max_tokens=20, temperature=0.0, stop_ids=(256,), stop=stop)
    stream = direct.submit(Request(prompt=[256, *b"User: one\nAssistant:"], params=params))
    stream.result()
    assert stream.text == first.choices[0].message.content
    ended = [] if stream.stop_id is None else [stream.stop_id]
    whole = [256, *b"User: one\nAssistant:", *stream.tokens, *ended]
    stream = direct.submit(Request(prompt=[*whole, *b"\nUser: two\nAssistant:"], params=params))
    stream.result()
    assert second.choices[0].message.content == stream.text
    assert second.usage.prompt_tokens == len("\nUser: two\nAssistant:")


def test_another_key_does_not_see_a_session(client, other_client):
    session = continue_text(client, "new", "secret").session
    with pytest.raises(openai.NotFoundError) as foreign:
        continue_text(other_client, session, "?")
    with pytest.raises(openai.NotFoundError) as absent:
        continue_text(other_client, "0" * 32, "?")
    assert foreign.value.body == absent.value.body
    with pytest.raises(openai.NotFoundError):
        continue_text(client, "../" + session, "?")
    assert continue_text(client, session, "!").session == session


def test_one_call_at_a_time(client):
    session = continue_text(client, "new", "a").session
    fields = {"max_tokens": MAX_ANSWER, "logit_bias": {"256": -100}, "stream": True}
    stream = continue_text(client, session, "b", **fields)
    next(iter(stream))
    with pytest.raises(openai.ConflictError, match="another call uses this session"):
        continue_text(client, session, "c")
    before = greedy_after(client, session, stream)
    # A turn whose client went leaves the session as it was.
    assert before == greedy_after(client, continue_text(client, "new", "a").session, None)


def greedy_after(client, session: str, stream) -> str:
    if stream is not None:
        stream.close()
    for _ in range(200):
        try:
            return continue_text(client, session, "x").choices[0].text
        except openai.ConflictError:
            time.sleep(0.05)
    raise AssertionError("the session stays in use")


def test_the_least_recently_used_session_is_dropped(tiny_model):
    with (
        running(make_test_engine(tiny_model), settings(max_sessions=2)) as server,
        client_of(server) as client,
    ):
        first, second = (continue_text(client, "new", text).session for text in "ab")
        continue_text(client, first, "c")
        third = continue_text(client, "new", "d").session
        with pytest.raises(openai.NotFoundError):
            continue_text(client, second, "e")
        for session in (first, third):
            continue_text(client, session, "f")


def test_sessions_on_disk_outlive_the_server(tiny_model, tmp_path, key_file):
    changes = {"session_dir": str(tmp_path / "sessions"), "api_key_file": key_file}
    engine = make_test_engine(tiny_model)
    with running(engine, settings(**changes)) as server, client_of(server) as client:
        session = continue_text(client, "new", "a").session
        expected_turns = [continue_text(client, continue_text(client, "new", "a").session, "b")]
    files = list((tmp_path / "sessions").iterdir())
    assert len(files) == 2
    assert not any(session in file.name for file in files)
    with (
        running(make_test_engine(tiny_model), settings(**changes)) as server,
        client_of(server) as client,
        client_of(server, KEYS[1]) as other,
    ):
        with pytest.raises(openai.NotFoundError):
            continue_text(other, session, "b")
        again = continue_text(client, session, "b")
        assert again.choices[0].text == expected_turns[0].choices[0].text
    for file in files:
        file.write_bytes(b"damaged")
    with (
        running(make_test_engine(tiny_model), settings(**changes)) as server,
        client_of(server) as client,
        pytest.raises(openai.NotFoundError, match="its file"),
    ):
        continue_text(client, session, "b")


def test_a_model_without_a_chat_template(tiny_model):
    with (
        running(make_test_engine(tiny_model), settings(chat_template="")) as server,
        client_of(server) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}])
        assert not client.models.list().data[0].has_chat_template
