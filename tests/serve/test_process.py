"""`megalodon serve` as a process: signals during a stream, errors before it serves."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from megalodon_jax.cli.main import main

NO_END = {"logit_bias": {"256": -100}, "stream": True, "temperature": 0}


@contextlib.contextmanager
def serving(run_dir: str, *options: str) -> Iterator[tuple[subprocess.Popen, openai.OpenAI]]:
    """The process, and a client of it."""
    command = ["serve", run_dir, "--port", "0", "--skip_warm_up", "--model_name", "tiny", *options]
    environment = {key: value for key, value in os.environ.items() if "API_KEY" not in key}
    process = subprocess.Popen(
        [sys.executable, "-m", "megalodon_jax", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"tiny at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line + process.stderr.read()
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="-", max_retries=0, timeout=120)
        with client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def begin(client: openai.OpenAI, max_tokens: int):
    stream = client.completions.create(model="tiny", prompt="doc", max_tokens=max_tokens, **NO_END)
    pieces = iter(stream)
    return pieces, next(pieces)


@pytest.mark.slow
def test_sigterm_lets_a_stream_end(trained_run):
    with serving(trained_run.run_dir) as (process, client):
        whole = "".join(piece.choices[0].text for piece in [*begin(client, 1500)[0]])
        pieces, first = begin(client, 1500)
        process.send_signal(signal.SIGTERM)
        rest = list(pieces)
        text = first.choices[0].text + "".join(piece.choices[0].text for piece in rest)
        assert text.endswith(whole)
        assert rest[-1].choices[0].finish_reason == "length"
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            client.models.list()
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.slow
def test_sigterm_cancels_after_its_seconds_and_a_second_one_exits(trained_run):
    options = ("--max_answer_tokens", "10000000")
    with serving(trained_run.run_dir, *options, "--shutdown_seconds", "0.5") as (process, client):
        pieces, _ = begin(client, 10_000_000)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server stops"):
            list(pieces)
        assert process.wait(30) == 0
        assert time.monotonic() - started < 10
    with serving(trained_run.run_dir, *options, "--shutdown_seconds", "600") as (process, client):
        begin(client, 10_000_000)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots", "1"], "slots is 1; use 2 or more"),
        (["--port", "70000"], "port is 70000"),
        (["--host", "0.0.0.0"], "host 0.0.0.0 can be reached by others; give an --api_key_file"),
        (["--api_key_file", "none.txt"], "cannot read --api_key_file"),
        (["--chat_template", "none.jinja"], "cannot read the chat template none.jinja"),
    ],
)
def test_errors_before_the_model_is_loaded(capsys, monkeypatch, options, message):
    monkeypatch.delenv("MEGALODON_API_KEY", raising=False)
    assert main(["serve", "none", *options]) != 0
    assert message in capsys.readouterr().err


def test_a_port_in_use(server, capsys):
    port = str(httpx.URL(server.address).port)
    assert main(["serve", "none", "--port", port]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


def test_the_key_of_the_environment(monkeypatch):
    from megalodon_jax.serve.settings import ServerSettings

    monkeypatch.setenv("MEGALODON_API_KEY", " secret \n")
    assert ServerSettings(host="0.0.0.0").api_keys() == ("secret",)
