"""Real servers of both stores, and a tiny run in a directory of each."""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megalodon_jax.config import TrainConfig
from megalodon_jax.storage.location import key_of, run_file_system
from tests.storage.server import BUCKET

SERVER = Path(__file__).with_name("server.py")
START_SECONDS = 60.0
PACKAGES = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto", "boto3")}


class Store(NamedTuple):
    """A bucket's folder that one test owns.

    Attributes:
      scheme: gs or s3.
      url: the folder.
      refusal: a local file; while it exists, the server answers every write with 403.
      process: the server.
    """

    scheme: str
    url: str
    refusal: Path
    process: subprocess.Popen[bytes]

    @property
    def files(self) -> Any:
        """The store's fsspec file system."""
        file_system = run_file_system(self.url)
        file_system.invalidate_cache()
        return file_system

    def key(self, name: str) -> str:
        return f"{key_of(self.url)}/{name}"

    def write(self, name: str, content: bytes) -> str:
        """Writes an object; returns its URL."""
        if self.scheme == "gs" and content.endswith((b"\r", b"\n")):
            # The emulator strips line breaks from the end of a multipart upload, gcsfs's form.
            bucket, _, key = self.key(name).partition("/")
            query = urllib.parse.urlencode({"uploadType": "media", "name": key})
            url = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o?{query}"
            request = urllib.request.Request(url, content, method="POST")
            request.add_header("Content-Type", "application/octet-stream")
            urllib.request.urlopen(request).close()
        else:
            self.files.pipe_file(self.key(name), content)
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        return self.files.cat_file(self.key(name))

    def names(self) -> list[str]:
        prefix = self.key("")
        return [name.removeprefix(prefix) for name in self.files.find(key_of(self.url))]


def environment_of(scheme: str, port: int) -> dict[str, str]:
    """Where the clients find a local server."""
    url = f"http://127.0.0.1:{port}"
    if scheme == "gs":
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            # The emulator lacks the interface that tells kinds of buckets apart.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def running_server(scheme: str, folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(SERVER), scheme, str(port), str(folder / "refuse")]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "the server does not start"
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


def started(scheme: str, folder: Path) -> Iterator[Store]:
    """A server that runs until the session ends; without its packages the tests are skipped."""
    missing = [name for name in PACKAGES[scheme] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (installed by .[dev])")
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, running_server(scheme, folder, port) as process:
        for name, value in environment_of(scheme, port).items():
            patch.setenv(name, value)
        if scheme == "s3":
            run_file_system(f"s3://{BUCKET}").mkdir(BUCKET)
        yield Store(scheme, f"{scheme}://{BUCKET}", folder / "refuse", process)


# fsspec keeps its clients, with the server's address, for the life of the process. A parametrized
# session fixture would start a second server at another address when its parameter returns.
@pytest.fixture(scope="session")
def gs_server(tmp_path_factory) -> Iterator[Store]:
    yield from started("gs", tmp_path_factory.mktemp("gs"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[Store]:
    yield from started("s3", tmp_path_factory.mktemp("s3"))


@pytest.fixture(params=["gs", "s3"])
def server(request) -> Store:
    """One server of each store for all tests."""
    return request.getfixturevalue(f"{request.param}_server")


_NUMBERS = itertools.count()


@pytest.fixture
def store(server) -> Iterator[Store]:
    """A folder of its own for each test."""
    yield server._replace(url=f"{server.url}/{next(_NUMBERS)}")
    server.refusal.unlink(missing_ok=True)


@pytest.fixture
def stored(store, session_config, shared_compilation, short_prefetch) -> TrainConfig:
    """The tiny run, in the store."""
    return dataclasses.replace(session_config, run_dir=f"{store.url}/run")


@pytest.fixture(autouse=True)
def no_local_folders(tmp_path, monkeypatch) -> Iterator[None]:
    """No test leaves a folder such as `gs:` where it runs."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not [name for name in os.listdir(tmp_path) if name.startswith(("gs:", "s3:"))]
