"""Refusals of the server, which stays free after them: fields, keys, sizes, queue, disconnects."""

import http.client
import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from megalodon_jax.serve.engine_thread import StartTimes
from tests.serve.conftest import (
    KEYS,
    MAX_ANSWER,
    MAX_PROMPT,
    MODEL,
    client_of,
    make_test_engine,
    running,
    settings,
)

CHAT = [{"role": "user", "content": "a"}]
HEADERS = {"Authorization": f"Bearer {KEYS[0]}"}


def metric(server, name: str, **labels: str) -> float:
    """A value of /metrics."""
    text = httpx.get(f"{server.address}/metrics", headers=HEADERS).text
    for line in text.splitlines():
        key, _, value = line.rpartition(" ")
        if key.partition("{")[0] == name and all(f'{k}="{v}"' in key for k, v in labels.items()):
            return float(value)
    return 0.0


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        ("completions", {"best_of": 3}, "best_of", "unsupported_parameter"),
        ("completions", {"suffix": "x"}, "suffix", "unsupported_parameter"),
        ("completions", {"messages": CHAT}, "messages", "unknown_parameter"),
        ("completions", {"temperatur": 1}, "temperatur", "unknown_parameter"),
        ("completions", {"temperature": -1}, "temperature", "invalid_value"),
        ("completions", {"temperature": "hot"}, "temperature", "invalid_value"),
        ("completions", {"top_p": 0}, "top_p", "invalid_value"),
        ("completions", {"top_k": 1.5}, "top_k", "invalid_value"),
        ("completions", {"presence_penalty": 3}, "presence_penalty", "invalid_value"),
        ("completions", {"max_tokens": 0}, "max_tokens", "invalid_value"),
        ("completions", {"max_tokens": MAX_ANSWER + 1}, "max_tokens", "invalid_value"),
        ("completions", {"max_tokens": True}, "max_tokens", "invalid_value"),
        ("completions", {"n": 0}, "n", "invalid_value"),
        ("completions", {"n": 5}, None, "invalid_value"),
        ("completions", {"logprobs": 21}, "logprobs", "invalid_value"),
        ("completions", {"logprobs": True}, "logprobs", "invalid_value"),
        ("completions", {"stop": ""}, "stop", "invalid_value"),
        ("completions", {"stop": ["a"] * 17}, "stop", "invalid_value"),
        ("completions", {"stop": [1]}, "stop", "invalid_value"),
        ("completions", {"seed": 2**63}, "seed", "invalid_value"),
        ("completions", {"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ("completions", {"logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
        ("completions", {"logit_bias": {"999": 1}}, None, "invalid_value"),
        ("completions", {"stream": 1}, "stream", "invalid_value"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options",
         "invalid_value"),
        ("completions", {"prompt": 3}, "prompt", "invalid_value"),
        ("completions", {"prompt": []}, "prompt", "invalid_value"),
        ("completions", {"prompt": [[1], []]}, "prompt", "invalid_value"),
        ("completions", {"prompt": [-1]}, "prompt", "invalid_value"),
        ("completions", {"prompt": [999]}, None, "invalid_value"),
        ("completions", {"prompt": "\ud800"}, "prompt", "invalid_value"),
        ("completions", {"prompt": None}, "prompt", "missing_required_parameter"),
        ("completions", {"prompt": "a" * MAX_PROMPT}, "prompt", "context_length_exceeded"),
        ("completions", {"session": "new", "n": 2}, "session", "invalid_value"),
        ("completions", {"session": "new", "echo": True}, "session", "invalid_value"),
        ("completions", {"session": 7}, "session", "invalid_value"),
        ("chat/completions", {"prompt": "a"}, "prompt", "unknown_parameter"),
        ("chat/completions", {"tools": [{}]}, "tools", "unsupported_parameter"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format",
         "unsupported_parameter"),
        ("chat/completions", {"store": True}, "store", "unsupported_parameter"),
        ("chat/completions", {"messages": []}, "messages", "invalid_value"),
        ("chat/completions", {"messages": None}, "messages", "missing_required_parameter"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]},
         "messages[0].role", "invalid_value"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content", "invalid_value"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
         "messages[0].tool_calls", "invalid_value"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ufdd0"}]}, "messages",
         "invalid_value"),
        ("chat/completions", {"logprobs": 3}, "logprobs", "invalid_value"),
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ("chat/completions", {"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens",
         "invalid_value"),
    ],
)  # fmt: skip
def test_fields_are_refused_by_name(server, path, fields, param, code):
    valid = {"completions": {"prompt": "a"}, "chat/completions": {"messages": CHAT}}[path]
    body = json.dumps({"model": MODEL, "max_tokens": 2, **valid, **fields})
    answer = httpx.post(
        f"{server.address}/v1/{path}",
        content=body,
        headers={**HEADERS, "Content-Type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.slow
def test_values_that_ask_for_nothing_are_accepted(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=1, store=False, tools=[], logit_bias={},
        response_format={"type": "text"}, stop=None, user="someone",
    )  # fmt: skip
    assert answer.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"prompt": NaN}', b"[" * 50_000, b"\xff"])
def test_a_body_that_is_no_object(server, body):
    headers = {**HEADERS, "Content-Type": "application/json"}
    answer = httpx.post(f"{server.address}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


def test_another_content_type(server):
    headers = {**HEADERS, "Content-Type": "text/plain"}
    body = json.dumps({"model": MODEL, "prompt": "a"})
    answer = httpx.post(f"{server.address}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 415


def test_unknown_models_and_addresses(server, client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.NotFoundError, match="gpt"):
        client.models.retrieve("gpt")
    answer = httpx.get(f"{server.address}/v1/embeddings", headers=HEADERS)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{server.address}/v1/completions", headers=HEADERS).status_code == 405


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"},
                                     {"Authorization": f"Basic {KEYS[0]}"}])  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/metrics"])
def test_without_a_key(server, path, headers):
    answer = httpx.get(f"{server.address}{path}", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_the_second_key_and_open_endpoints(server, other_client):
    assert other_client.models.list().data
    assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}
    assert "<textarea" in httpx.get(f"{server.address}/").text


def test_a_name_that_resolves_to_this_machine(server, tiny_model):
    with running(make_test_engine(tiny_model), settings()) as other:
        answer = httpx.get(f"{other.address}/v1/models", headers={"Host": "example.org"})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "invalid_host"
        assert httpx.get(f"{other.address}/v1/models").status_code == 200
    # A key is enough: a proxy passes its own name on.
    answer = httpx.get(f"{server.address}/v1/models", headers={"Host": "a.org", **HEADERS})
    assert answer.status_code == 200


def test_an_error_of_the_server_itself(tiny_model, monkeypatch):
    from megalodon_jax.serve.calls import Planner

    def plan(*arguments):
        raise KeyError("a mistake")

    monkeypatch.setattr(Planner, "plan", plan)
    with running(make_test_engine(tiny_model), settings()) as server, client_of(server) as client:
        with pytest.raises(openai.InternalServerError, match="log says why"):
            client.completions.create(model=MODEL, prompt="a")
        assert httpx.get(f"{server.address}/health").status_code == 200
        assert metric(server, "megalodon_requests_total", outcome="error") == 1


def test_no_cors_unless_allowed(server, tiny_model):
    headers = {"Origin": "http://example.org", **HEADERS}
    answer = httpx.get(f"{server.address}/v1/models", headers=headers)
    assert "access-control-allow-origin" not in answer.headers
    allowed = settings(cors_origin=("http://example.org",))
    with running(make_test_engine(tiny_model), allowed) as other:
        answer = httpx.get(f"{other.address}/v1/models", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "http://example.org"


@pytest.mark.parametrize("has_length", [True, False])
def test_a_large_body(server, has_length):
    body = b" " * 100_001
    content = body if has_length else (body[i : i + 1000] for i in range(0, len(body), 1000))
    headers = {**HEADERS, "Content-Type": "application/json"}
    answer = httpx.post(f"{server.address}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.slow
def test_a_client_that_goes_frees_its_slot(server, client, is_streaming):
    before = metric(server, "megalodon_requests_total", outcome="cancelled")
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc)
    body = {"model": MODEL, "prompt": "a", "max_tokens": MAX_ANSWER, "stream": is_streaming,
            "logit_bias": {"256": -100}, "n": 4}  # fmt: skip
    headers = {**HEADERS, "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    wait_until(lambda: server.thread.num_running == 4)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_until(lambda: server.thread.num_running == 0)
    wait_until(
        lambda: metric(server, "megalodon_requests_total", outcome="cancelled") == before + 1
    )
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices


def test_a_full_queue(tiny_model):
    engine = make_test_engine(tiny_model, max_waiting=1)
    with running(engine, settings()) as server, client_of(server) as client:
        fields = {"model": MODEL, "prompt": "a", "max_tokens": MAX_ANSWER, "n": 4, "stream": True,
                  "logit_bias": {"256": -100}}  # fmt: skip
        first = client.completions.create(**fields)
        next(iter(first))
        second = client.completions.create(**fields)
        with pytest.raises(openai.RateLimitError, match="the queue is full") as refused:
            client.completions.create(model=MODEL, prompt="b")
        assert refused.value.response.headers["retry-after"] == "1"
        # The last one of three started 20 seconds ago, the others at the same time.
        now = time.perf_counter()
        for seconds in (20.0, 20.0, 20.0):
            server.thread.starts.add(now - seconds)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=MODEL, prompt="b")
        assert 20 <= int(refused.value.response.headers["retry-after"]) < 60
        server.thread.starts.add(now - 1e6)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=MODEL, prompt="b")
        assert refused.value.response.headers["retry-after"] == "60"
        # A waiting request that is cancelled makes room in the queue.
        second.close()
        wait_until(lambda: server.thread.num_waiting == 0)
        third = client.completions.create(**fields)
        first.close()
        third.close()
        wait_until(lambda: server.thread.num_running == 0)
        assert metric(server, "megalodon_requests_total", outcome="busy") == 3


def test_retry_after_is_the_pace_of_the_queue():
    starts = StartTimes()
    assert starts.seconds_to_next(5.0) == 0.0
    starts.add(10.0)
    assert starts.seconds_to_next(1000.0) == 0.0
    # A pause of an hour is one gap among several.
    for now in (3610.0, 3613.0, 3616.0, 3619.5):
        starts.add(now)
    assert starts.seconds_to_next(3620.0) == pytest.approx(3.25)
    # Longer answers than before: the current gap counts.
    assert starts.seconds_to_next(3640.0) == pytest.approx(20.5)
    # Old gaps are forgotten.
    for step in range(16):
        starts.add(3650.0 + step)
    assert starts.seconds_to_next(3665.0) == pytest.approx(1.0)


def test_metrics_count(server, client):
    names = ("megalodon_prompt_tokens_total", "megalodon_generated_tokens_total",
             "megalodon_time_to_first_token_seconds_count",
             "megalodon_time_between_tokens_seconds_count")  # fmt: skip

    def values():
        ok = metric(server, "megalodon_requests_total", outcome="ok", endpoint="/v1/completions")
        return [ok, *(metric(server, name) for name in names)]

    before = values()
    answer = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=30, logit_bias={"256": -100}
    )
    assert answer.usage.completion_tokens == 30
    gained = [after - start for after, start in zip(values(), before, strict=True)]
    # The first token has no token before it.
    assert gained == [1, 4, 30, 1, 29]
    for name in ("queue_length", "active_slots"):
        assert metric(server, f"megalodon_{name}") == 0


def test_an_engine_that_fails_answers_everybody(tiny_model):
    engine = make_test_engine(tiny_model)
    steps = engine.step
    is_broken = []

    def step():
        if is_broken:
            raise RuntimeError("the device is gone")
        steps()

    engine.step = step
    with running(engine, settings()) as server, client_of(server) as client:
        fields = {"model": MODEL, "prompt": "a", "max_tokens": MAX_ANSWER, "logit_bias":
                  {"256": -100}}  # fmt: skip
        stream = client.completions.create(**fields, stream=True)
        next(iter(stream))
        is_broken.append(True)
        with pytest.raises(openai.APIError, match="the engine has failed"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="the engine has failed"):
            client.completions.create(**fields)
        answer = httpx.get(f"{server.address}/health")
        assert answer.status_code == 503
        assert answer.json() == {"status": "the engine has failed"}
