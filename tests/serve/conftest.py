"""A server on a thread, with a tiny model of random weights, shared by the tests of the API."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from megalodon_jax.data import ByteTokenizer
from megalodon_jax.inference.engine import Engine
from megalodon_jax.model import Megalodon
from megalodon_jax.serve.server import Server
from megalodon_jax.serve.settings import ServerSettings
from tests.fixtures_runs import TINY_MODEL
from tests.model.conftest import perturbed

MODEL = "tiny"
KEYS = ("key-one", "key-two")
MAX_PROMPT = 3000
MAX_ANSWER = 2000


@pytest.fixture(scope="module", autouse=True)
def _tiny_programs(shared_compilation):
    pass


@pytest.fixture(scope="session")
def tiny_model() -> Megalodon:
    return perturbed(dataclasses.replace(TINY_MODEL, num_layers=1))


@contextlib.contextmanager
def running(engine: Engine, settings: ServerSettings) -> Iterator[Server]:
    """A server until the end of the context."""
    server = Server(engine, settings, model_name=MODEL)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


def settings(**changes: Any) -> ServerSettings:
    values: dict[str, Any] = {
        "port": 0, "slots": 4, "chat_template": "plain", "max_prompt_tokens": MAX_PROMPT,
        "max_answer_tokens": MAX_ANSWER, "shutdown_seconds": 5.0, "max_body_bytes": 100_000,
    }  # fmt: skip
    return ServerSettings(**values | changes)


@pytest.fixture(scope="session")
def key_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text("\n".join(KEYS) + "\n")
    return str(path)


def make_test_engine(model: Megalodon, **changes: Any) -> Engine:
    return Engine(
        model, **{"slots": 4, "tokenizer": ByteTokenizer(), "short_blocks": True,
                  "fixed_bucket": True, **changes}
    )  # fmt: skip


@pytest.fixture(scope="session")
def server(tiny_model, key_file) -> Iterator[Server]:
    with running(make_test_engine(tiny_model), settings(api_key_file=key_file)) as server:
        yield server


def client_of(server: Server, key: str = KEYS[0]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0, timeout=60.0)


@pytest.fixture(scope="session")
def client(server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="session")
def other_client(server) -> Iterator[openai.OpenAI]:
    with client_of(server, KEYS[1]) as client:
        yield client


@pytest.fixture(scope="session")
def direct(tiny_model) -> Engine:
    """An engine without a server, to compare with."""
    return make_test_engine(tiny_model)
