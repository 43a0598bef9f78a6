"""Upload to a local HTTP server that speaks the hub's endpoints of a small repository."""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from flax import nnx

from megalodon_jax.cli.main import main
from megalodon_jax.config import ModelConfig
from megalodon_jax.errors import ConfigError, ConvertError
from megalodon_jax.interop.convert import convert
from megalodon_jax.interop.huggingface import push_to_hub
from megalodon_jax.model import Megalodon
from megalodon_jax.pretrained import save

SMALL = ModelConfig(
    num_layers=1, model_dim=8, z_dim=4, value_dim=8, ffn_hidden_dim=8, cema_ndim=2, chunk_size=16,
    vocab_size=11, norm_num_groups=2,
)  # fmt: skip


class _Hub(ThreadingHTTPServer):
    """Keeps what was committed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.created: list[dict] = []
        self.refuses = False
        self.paths: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: _Hub  # type: ignore[assignment]

    def log_message(self, format, *args):
        del format, args

    def _answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.paths.append(self.path)
        self._answer({"id": "me/tiny", "sha": "0" * 40, "siblings": [], "error": ""})

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.paths.append(self.path)
        self.server.tokens.add(self.headers.get("Authorization"))
        url = f"http://127.0.0.1:{self.server.server_port}/me/tiny"
        if self.server.refuses:
            self._answer({"error": "no such owner"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": url})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            names = [file["path"] for file in files]
            # Everything in the commit itself: a server of large files is another one.
            answer = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]
            self._answer({"files": answer})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            self._answer(
                {"commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
            )
        else:
            self._answer({"error": f"unknown {self.path}"}, 404)


@pytest.fixture
def hub(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="uploads with it")
    server = _Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save(Megalodon(SMALL, rngs=nnx.Rngs(0)), path)
    return path


def test_a_folder_is_uploaded_whole(hub, weights, tmp_path, capsys):
    folder = tmp_path / "hf"
    command = ["convert", str(weights), str(folder), "--to", "huggingface", "--push", "me/tiny"]
    assert main(command) == 0, hub.paths
    assert "/me/tiny/commit/" in capsys.readouterr().out
    assert hub.created[0]["name"] == "tiny"
    assert hub.tokens == {"Bearer hf_secret"}
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: hub.files.get(name) for name in expected} == expected


def test_a_refused_upload_keeps_the_folder_and_says_why(hub, weights, tmp_path):
    hub.refuses = True
    with pytest.raises(ConvertError, match=r"was written, but could not be uploaded to 'me/tiny'"):
        convert(weights, tmp_path / "hf", to="huggingface", push="me/tiny")
    assert (tmp_path / "hf" / "config.json").exists()
    with pytest.raises(ConvertError, match="could not be uploaded to 'a/b/c'"):
        push_to_hub(tmp_path / "hf", "a/b/c")


def test_only_this_form_is_uploaded(weights, tmp_path):
    with pytest.raises(ConvertError, match="add --to huggingface"):
        convert(weights, tmp_path / "run", push="me/tiny")


def test_without_the_package_nothing_is_written(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install \"megalodon-flax\[hub\]\""):
        convert(weights, tmp_path / "hf", to="huggingface", push="me/tiny")
    assert not list(tmp_path.iterdir())
