"""The web application: endpoints, keys, limits."""

import asyncio
import contextlib
import hashlib
import hmac
import importlib.resources
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import anyio
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from megalodon_jax.errors import DataError, EngineBusyError, RequestError, SessionError
from megalodon_jax.serve import fields
from megalodon_jax.serve.calls import Planner
from megalodon_jax.serve.engine_thread import Answer, Delta, EngineThread
from megalodon_jax.serve.errors import ApiError
from megalodon_jax.serve.metrics import Metrics
from megalodon_jax.serve.responses import Envelope, Form, Usage
from megalodon_jax.serve.session_store import Lease, SessionStore
from megalodon_jax.serve.settings import LOOPBACK_HOSTS, ServerSettings

_OUTCOMES = {401: "unauthorized", 429: "busy"}
# The status that HTTP servers log for a client that has gone; nobody reads it.
_CLIENT_GONE = 499
_PING_SECONDS = 15
_MAX_RETRY_SECONDS = 60


class Api:
    """The endpoints of one model.

    Attributes:
      is_stopping: new calls are answered with 503.

    Args:
      thread: of the engine, started.
      planner: turns calls into requests.
      sessions: of the clients.
      metrics: of the server.
      settings: keys and limits.
      model_name: name of the model in calls.
    """

    def __init__(
        self,
        thread: EngineThread,
        planner: Planner,
        sessions: SessionStore,
        metrics: Metrics,
        settings: ServerSettings,
        model_name: str,
    ):
        self.is_stopping = False
        self._thread, self._planner, self._sessions = thread, planner, sessions
        self._metrics, self._settings, self._model_name = metrics, settings, model_name
        self._created = int(time.time())
        self._keys = [_digest(key) for key in settings.api_keys()]
        page = importlib.resources.files("megalodon_jax.serve").joinpath("page.html")
        self._page = page.read_text("utf-8")

    def application(self) -> Starlette:
        """The ASGI application."""
        middleware = []
        if self._settings.cors_origin:
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(self._settings.cors_origin),
                    allow_methods=["GET", "POST"],
                    allow_headers=["authorization", "content-type"],
                )
            )
        endpoints = {
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/models": ("GET", self._models),
            "/v1/models/{name:path}": ("GET", self._model),
            "/metrics": ("GET", self._metrics_text),
        }
        return Starlette(
            routes=[
                *(
                    Route(path, self._endpoint(path.partition("/{")[0], run), methods=[method])
                    for path, (method, run) in endpoints.items()
                ),
                Route("/health", self._health),
                Route("/", self._show_page),
            ],
            middleware=middleware,
            exception_handlers={404: _not_found, 405: _not_found},
        )

    def _endpoint(
        self, name: str, run: Callable[[Request, str], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that checks the key and writes errors."""

        async def respond(request: Request) -> Response:
            try:
                response = await run(request, self._owner(request))
            except (ClientDisconnect, asyncio.CancelledError) as error:
                self._count(name, "cancelled")
                if isinstance(error, asyncio.CancelledError):
                    raise
                return Response(status_code=_CLIENT_GONE)
            except Exception as error:
                known = self._as_api_error(error)
                self._count(name, _outcome(known))
                return known.response()
            if isinstance(response, _AnswerStream):
                response.on_end = lambda outcome: self._count(name, outcome)
            else:
                self._count(name, "ok")
            return response

        return respond

    def _as_api_error(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, EngineBusyError):
            return ApiError(
                429, f"the queue is full: {error}", code="queue_full",
                headers={"Retry-After": str(self._retry_seconds())},
            )  # fmt: skip
        if isinstance(error, RequestError | SessionError | DataError):
            return ApiError(400, str(error), code="invalid_value")
        logging.getLogger(__name__).error("a call failed", exc_info=error)
        return ApiError(500, "the call failed; the server's log says why")

    def _retry_seconds(self) -> int:
        """Seconds after which a place in the queue should be free."""
        seconds = self._thread.starts.seconds_to_next(time.perf_counter())
        return min(max(1, math.ceil(seconds)), _MAX_RETRY_SECONDS)

    def _count(self, endpoint: str, outcome: str) -> None:
        self._metrics.requests.labels(endpoint, outcome).inc()

    def _owner(self, request: Request) -> str:
        """The identity of a call's API key; "" without keys."""
        if not self._keys:
            # A page of another origin whose name resolves to this machine reads what it answers.
            if request.url.hostname not in LOOPBACK_HOSTS:
                raise ApiError(
                    403, f"the server has no API key and is called {request.url.hostname}; call "
                    "127.0.0.1 or localhost", code="invalid_host",
                )  # fmt: skip
            return ""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All keys are compared, and digests have one length: the time says nothing about them.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401, "the API key is missing or wrong; send \"Authorization: Bearer KEY\"",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return given

    # ---- Small endpoints.

    async def _health(self, request: Request) -> Response:
        del request
        if not self._thread.is_alive:
            return JSONResponse({"status": "the engine has failed"}, 503)
        if self.is_stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def _show_page(self, request: Request) -> Response:
        del request
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        return HTMLResponse(
            self._page,
            headers={"Content-Security-Policy": f"{policy}connect-src 'self'; img-src data:"},
        )

    async def _metrics_text(self, request: Request, owner: str) -> Response:
        del request, owner
        return Response(self._metrics.text(), media_type=self._metrics.content_type)

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "megalodon",
            "has_chat_template": self._planner.has_chat_template,
        }

    async def _models(self, request: Request, owner: str) -> Response:
        del request, owner
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: Request, owner: str) -> Response:
        del owner
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_object())

    def _check_model(self, name: str) -> None:
        if name != self._model_name:
            raise ApiError(
                404, f"there is no model {name!r}; this server has {self._model_name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    # ---- Answers.

    async def _completions(self, request: Request, owner: str) -> Response:
        body = fields.parse_json(await self._body(request))
        most = self._settings.max_answer_tokens
        return await self._answer(request, owner, fields.completion_call(body, max_tokens=most))

    async def _chat(self, request: Request, owner: str) -> Response:
        body = fields.parse_json(await self._body(request))
        most = self._settings.max_answer_tokens
        return await self._answer(request, owner, fields.chat_call(body, max_tokens=most))

    async def _body(self, request: Request) -> bytes:
        if self.is_stopping:
            raise ApiError(503, "the server stops; call another one")
        # Browsers send other types to any server without asking it.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, 'send the header "Content-Type: application/json"')
        limit = self._settings.max_body_bytes
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise ApiError(
                    413, f"the body has more than {limit:,} bytes", code="body_too_large"
                )
        return bytes(body)

    async def _answer(self, request: Request, owner: str, call: fields.Call) -> Response:
        self._check_model(call.model)
        async with contextlib.AsyncExitStack() as stack:
            lease = None
            if call.session is not None:
                lease = await stack.enter_async_context(self._sessions.lease(call.session, owner))
            session = None if lease is None else lease.session
            client = f"{owner} {call.user}"
            # A long text keeps the tokenizer busy for seconds.
            plan = await asyncio.to_thread(self._planner.plan, call, session, client)
            answer = await self._thread.submit(plan.requests, call.n)
            stack.callback(answer.close)
            envelope = Envelope(plan.form, self._model_name, lease and lease.id)
            num_prompt_tokens = sum(len(each.prompt) for each in plan.requests)
            if call.is_streaming:
                events = _stream(
                    plan.form, envelope, answer, lease, stack.pop_all(), num_prompt_tokens,
                    includes_usage=call.includes_usage,
                )  # fmt: skip
                return _AnswerStream(events)
            drops = isinstance(call, fields.CompletionCall) and call.drops_answer
            deltas = await _unless_gone(request, _collect(answer))
            _finish(lease, answer)
        choices = [plan.form.choice(delta, answer) for delta in deltas]
        num_tokens = 0 if drops else sum(len(delta.tokens) for delta in deltas)
        return JSONResponse(envelope.whole(choices, Usage(num_prompt_tokens, num_tokens)))


class _AnswerStream(EventSourceResponse):
    """A stream of events that says how it ended.

    Attributes:
      on_end: called with the outcome.
    """

    def __init__(self, events: "_Events"):
        super().__init__(events, ping=_PING_SECONDS, sep="\n")
        self.on_end: Callable[[str], None] = lambda outcome: None
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A response that is cancelled before its first event has not begun to iterate.
            with anyio.CancelScope(shield=True):
                await self._events.release()
            self.on_end(self._events.outcome)


class _Events:
    """The events of a streamed answer.

    Attributes:
      outcome: how it ended so far.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any]], resources: contextlib.AsyncExitStack):
        self.outcome = "cancelled"
        self._events, self._resources = events, resources

    async def __aiter__(self) -> AsyncIterator[dict[str, str]]:
        try:
            async for event in self._events:
                yield {"data": json.dumps(event)}
            # The session is there before the client knows that the answer has ended.
            await self.release()
            self.outcome = "ok"
            yield {"data": "[DONE]"}
        except ApiError as error:
            self.outcome = _outcome(error)
            yield {"data": json.dumps(error.body())}

    async def release(self) -> None:
        """Cancels what is running and hands the session back."""
        await self._resources.aclose()


def _stream(
    form: Form,
    envelope: Envelope,
    answer: Answer,
    lease: Lease | None,
    resources: contextlib.AsyncExitStack,
    num_prompt_tokens: int,
    *,
    includes_usage: bool,
) -> _Events:
    async def objects() -> AsyncIterator[dict[str, Any]]:
        num_tokens = 0
        usage = {"usage": None} if includes_usage else {}
        async for delta in answer.deltas():
            num_tokens += len(delta.tokens)
            yield {**envelope.chunk([form.chunk_choice(delta, answer)]), **usage}
        _finish(lease, answer)
        if includes_usage:
            total = Usage(num_prompt_tokens, num_tokens).as_object()
            yield {**envelope.chunk([]), "usage": total}

    return _Events(objects(), resources)


async def _collect(answer: Answer) -> list[Delta]:
    """All tokens of every sample as one delta."""
    found: dict[int, list[Delta]] = {}
    async for delta in answer.deltas():
        found.setdefault(delta.index, []).append(delta)
    return [_joined(found[index]) for index in sorted(found)]


def _joined(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        deltas[0].index,
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.tokens),
        tuple(entry for delta in deltas for entry in delta.logprobs),
        deltas[-1].finish_reason,
    )


def _finish(lease: Lease | None, answer: Answer) -> None:
    if lease is not None:
        if answer.session is None:
            raise ApiError(500, "the engine kept no state for the session")
        lease.result = answer.session


async def _unless_gone[T](request: Request, work: Awaitable[T]) -> T:
    """The result of some work, unless the client goes before.

    Raises:
      ClientDisconnect: it has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _outcome(error: ApiError) -> str:
    return _OUTCOMES.get(error.status, "error" if error.status >= 500 else "refused")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    message = f"there is no {request.method} {request.url.path}; see /v1/models"
    return ApiError(status, message, code="unknown_url").response()
