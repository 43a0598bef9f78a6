"""A running server: the engine's thread, the web application, signals."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn
from sse_starlette.sse import AppStatus

from megalodon_jax.config import KvFormat, WeightFormat
from megalodon_jax.data.chat_template import ChatTemplate
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.errors import ConfigError
from megalodon_jax.generate import max_length
from megalodon_jax.inference.engine import Engine
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.serve.app import Api
from megalodon_jax.serve.calls import Planner
from megalodon_jax.serve.engine_thread import EngineThread
from megalodon_jax.serve.errors import ApiError
from megalodon_jax.serve.metrics import Metrics
from megalodon_jax.serve.responses import TokenTexts
from megalodon_jax.serve.session_store import SessionStore
from megalodon_jax.serve.settings import ServerSettings

# Seconds in which answers that were cancelled reach their clients.
_LAST_SECONDS = 5.0
_BACKLOG = 2048


def make_engine(
    model: LanguageModel,
    tokenizer: Tokenizer,
    settings: ServerSettings,
    *,
    weights: WeightFormat = "model",
    kv: KvFormat = "model",
) -> Engine:
    """The engine of a server; formats of weights, keys and values as in `Engine`."""
    return Engine(
        model,
        slots=settings.slots,
        tokenizer=tokenizer,
        max_length=max_length(model, settings.max_prompt_tokens + settings.max_answer_tokens),
        max_waiting=settings.max_waiting,
        short_blocks=True,
        weights=weights,
        kv=kv,
    )


def bind(settings: ServerSettings) -> socket.socket:
    """Takes the address of a server; connections are refused until the server is made.

    Raises:
      ConfigError: the address is in use, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with _naming_address(settings, listener):
        listener.bind((settings.host, settings.port))
    return listener


class Server:
    """Serves one model over HTTP.

    Args:
      engine: with a tokenizer; only the server may use it from here on.
      settings: address, keys and limits.
      model_name: name of the model in calls.
      listener: from `bind`; None: the server binds its address itself.

    Raises:
      ConfigError: the address is in use, or the settings cannot be used.
      DataError: the chat template cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServerSettings,
        *,
        model_name: str,
        listener: socket.socket | None = None,
    ):
        tokenizer = engine.tokenizer
        if tokenizer is None:
            raise ConfigError("the engine has no tokenizer: pass Engine(..., tokenizer=)")
        if settings.chat_template:
            template = ChatTemplate.load(settings.chat_template)
        else:
            template = ChatTemplate.of_tokenizer(tokenizer)
        metrics = Metrics()
        self.thread = EngineThread(engine, metrics)
        sessions = SessionStore(
            settings.max_sessions, _session_directory(settings), self.thread.load_session
        )
        metrics.add_gauge("queue_length", "Requests that wait", lambda: self.thread.num_waiting)
        metrics.add_gauge("active_slots", "Requests that run", lambda: self.thread.num_running)
        metrics.add_gauge("sessions", "Sessions in memory", lambda: len(sessions))
        planner = Planner(TokenTexts(tokenizer), template, settings)
        self._settings = settings
        self._api = Api(self.thread, planner, sessions, metrics, settings, model_name)
        self._socket = bind(settings) if listener is None else listener
        with _naming_address(settings, self._socket):
            self._socket.listen(_BACKLOG)
        config = uvicorn.Config(
            self._api.application(),
            access_log=False,
            log_level="warning",
            lifespan="off",
            ws="none",
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=int(settings.shutdown_seconds + _LAST_SECONDS) + 1,
        )
        # It would end all streams at the signal.
        AppStatus.disable_automatic_graceful_drain()
        self._uvicorn = _Uvicorn(config, self._begin_shutdown)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def address(self) -> str:
        """Where the server is: http://host:port."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> int:
        """Serves until a signal or `stop`; returns the exit code: 1 if the engine has failed."""
        self.thread.start()
        try:
            asyncio.run(self._serve())
        finally:
            has_failed = self.thread.failure is not None
            self.thread.stop(_LAST_SECONDS)
        return 1 if has_failed else 0

    def stop(self) -> None:
        """Begins the shutdown from another thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_shutdown)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        with self._socket:
            await self._uvicorn.serve(sockets=[self._socket])

    def _begin_shutdown(self) -> None:
        """Refuses new calls; running ones end after `shutdown_seconds`."""
        self._api.is_stopping = True
        self._uvicorn.should_exit = True
        timer = threading.Timer(
            self._settings.shutdown_seconds,
            lambda: self.thread.cancel_all(ApiError(503, "the server stops")),
        )
        timer.daemon = True
        timer.start()


class _Uvicorn(uvicorn.Server):
    """Shuts down at the first signal and exits at once at the second."""

    def __init__(self, config: uvicorn.Config, begin_shutdown: Callable[[], None]):
        super().__init__(config)
        self._begin_shutdown = begin_shutdown

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM; the process does not end with the signal's own exit code."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.should_exit:
            os._exit(128 + number)
        self._begin_shutdown()


def _session_directory(settings: ServerSettings) -> Path | None:
    if not settings.session_dir:
        return None
    directory = Path(settings.session_dir).expanduser()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


@contextlib.contextmanager
def _naming_address(settings: ServerSettings, listener: socket.socket) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen at {settings.host}:{settings.port}: {error.strerror or error}"
        ) from error
