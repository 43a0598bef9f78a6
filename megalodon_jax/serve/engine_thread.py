"""An engine on a thread of its own, for callers in an event loop."""

import asyncio
import collections
import contextlib
import itertools
import logging
import os
import queue
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from megalodon_jax.errors import MegalodonError
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import FinishReason, Request, Stream, TokenLogprobs
from megalodon_jax.inference.sessions import Session
from megalodon_jax.serve.errors import ApiError
from megalodon_jax.serve.metrics import Metrics

_RECENT_STARTS = 16


class Delta(NamedTuple):
    """New tokens of one sample.

    Attributes:
      index: of the sample among all of a call.
      text: that the tokens complete.
      tokens: their ids.
      logprobs: theirs, if the request asks for them.
      finish_reason: None while the sample is running.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None


class _Sample:
    """The part of a stream that the event loop reads; the engine's thread writes it."""

    def __init__(self, stream: Stream, index: int):
        self.stream, self.index = stream, index
        self.num_pieces = self.num_tokens = 0
        self.is_closed = False

    def new(self) -> Delta | None:
        """The tokens and text since the last call."""
        stream = self.stream
        if self.is_closed:
            return None
        pieces = stream.text_pieces()
        text = "".join(pieces[self.num_pieces :])
        start, stop = self.num_tokens, max(self.num_tokens, stream.num_settled_tokens)
        self.num_pieces, self.num_tokens = len(pieces), stop
        if not text and start == stop and not stream.is_finished:
            return None
        self.is_closed = stream.is_finished
        return Delta(
            self.index,
            text,
            tuple(stream.tokens[start:stop]),
            tuple(stream.logprobs[start:stop]),
            stream.finish_reason,
        )


class Answer:
    """The samples of one call, as they come; made by `EngineThread.submit`.

    Attributes:
      n: samples of every prompt; sample i of prompt j has the index j n + i.
      prompt_logprobs: of every prompt, if asked for; there with the first delta of a sample.
      session: the state after the answer, if the request keeps it; there with the last delta.
    """

    def __init__(self, thread: "EngineThread", num_prompts: int, n: int):
        self.prompt_logprobs: list[list[TokenLogprobs | None]] = [[]] * num_prompts
        self.n = n
        self.session: Session | None = None
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Sequence[Delta] | ApiError] = asyncio.Queue()
        self._num_open = num_prompts * n
        self._is_closed = False
        # These belong to the engine's thread.
        self.samples: list[_Sample] = []
        self.last_time = time.perf_counter()
        self.has_started = False

    async def deltas(self) -> AsyncIterator[Delta]:
        """New tokens of all samples until the last one ends.

        Raises:
          ApiError: the engine failed, or the server stops.
        """
        while self._num_open:
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            for delta in event:
                if delta.finish_reason == "invalid":
                    raise ApiError(500, "the model's scores are NaN; check its weights")
                if delta.finish_reason is not None:
                    self._num_open -= 1
                yield delta

    def close(self) -> None:
        """Cancels what is still running; may be called at any time, more than once."""
        if self._num_open and not self._is_closed:
            self._is_closed = True
            self._thread.cancel(self)

    def send(self, event: Sequence[Delta] | ApiError) -> None:
        """Hands an event over; the engine's thread calls it."""
        # RuntimeError: the loop has ended, and nobody waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class StartTimes:
    """When requests started, and how long the next one will take to start.

    The start of a request frees its place in the queue.
    """

    def __init__(self) -> None:
        # Gaps of the recent past: a pause of the clients is one of many.
        self._times: collections.deque[float] = collections.deque(maxlen=_RECENT_STARTS)

    def add(self, now: float) -> None:
        """Notes a start at a time in seconds."""
        self._times.append(now)

    def seconds_to_next(self, now: float) -> float:
        """Seconds until the next start: the median gap, or the current one if that is longer.

        0 if fewer than two requests have started.
        """
        times = tuple(self._times)
        if len(times) < 2:
            return 0.0
        gaps = [after - before for before, after in itertools.pairwise(times)]
        return max(statistics.median(gaps), now - times[-1])


class EngineThread:
    """Runs an engine; every call of it happens on its thread.

    Attributes:
      failure: what ended the thread, or None.
      num_running: requests in slots, after the last step.
      num_waiting: requests in the queue or in prefill, after the last step.
      starts: when requests gave their first token.

    Args:
      engine: with a tokenizer; nobody else may use it after `start`.
      metrics: where tokens and times are counted.
    """

    def __init__(self, engine: Engine, metrics: Metrics):
        self.failure: BaseException | None = None
        self.num_running = self.num_waiting = 0
        self.starts = StartTimes()
        self._engine, self._metrics = engine, metrics
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._answers: list[Answer] = []
        self._lock = threading.Lock()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after the step that it is in; unfinished answers get an error."""
        self._post(self._stop)
        self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        """Whether requests can be run."""
        return self.failure is None and self._thread.is_alive()

    async def submit(self, requests: Sequence[Request], n: int = 1) -> Answer:
        """Queues n samples of every request: all of them, or none and an error.

        Raises:
          RequestError: a request cannot be run.
          EngineBusyError: the queue is full.
          SessionError: the session belongs to another model.
          ApiError: the engine has failed.
        """
        answer = Answer(self, len(requests), n)
        try:
            await self._call(lambda: self._submit(answer, requests))
        except asyncio.CancelledError:
            # The client has gone before the engine looked at the request.
            answer.close()
            raise
        return answer

    async def load_session(self, path: str | os.PathLike[str]) -> Session:
        """Reads a file of `Session.save`; raises SessionError as `Engine.load_session`."""
        return await self._call(lambda: self._engine.load_session(path))

    def cancel(self, answer: Answer) -> None:
        """Ends an answer's samples and frees their slots."""
        self._post(lambda: self._cancel(answer))

    def cancel_all(self, error: ApiError) -> None:
        """Ends all answers with an error."""

        def cancel() -> None:
            for answer in list(self._answers):
                answer.send(error)
                self._cancel(answer)

        self._post(cancel)

    # ---- On the engine's thread.

    async def _call[T](self, function: Callable[[], T]) -> T:
        """Calls a function on the engine's thread."""
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._post(function, result)
        return await result

    def _post(self, run: Callable[[], Any], result: asyncio.Future[Any] | None = None) -> None:
        with self._lock:
            if self.failure is None:
                self._commands.put(_Command(run, result))
            elif result is not None:
                result.set_exception(_failed())

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._take_commands()
                if not self._engine.is_idle:
                    self._engine.step()
                    self._publish()
                self.num_running = self._engine.num_running
                self.num_waiting = self._engine.num_waiting
        except BaseException as error:
            logging.getLogger(__name__).critical("the engine has failed", exc_info=error)
            self._end(error, _failed())
        else:
            self._end(RuntimeError("the server has stopped"), ApiError(503, "the server stops"))

    def _take_commands(self) -> None:
        if self._engine.is_idle and not self._answers:
            self._commands.get().execute()
        while not self._is_stopping:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command.execute()

    def _submit(self, answer: Answer, requests: Sequence[Request]) -> None:
        try:
            for request in requests:
                for stream in self._engine.submit_samples(request, answer.n):
                    answer.samples.append(_Sample(stream, len(answer.samples)))
        except MegalodonError:
            self._cancel(answer)
            raise
        self._answers.append(answer)
        self._metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))

    def _cancel(self, answer: Answer) -> None:
        if answer in self._answers:
            self._answers.remove(answer)
        for sample in answer.samples:
            self._engine.cancel(sample.stream)

    def _publish(self) -> None:
        now = time.perf_counter()
        for answer in list(self._answers):
            deltas = [delta for sample in answer.samples if (delta := sample.new()) is not None]
            if not deltas:
                continue
            self._observe(answer, deltas, now)
            streams = [sample.stream for sample in answer.samples]
            answer.prompt_logprobs = [each.prompt_logprobs for each in streams[:: answer.n]]
            answer.session = streams[0].session
            if all(stream.is_finished for stream in streams):
                self._answers.remove(answer)
            answer.send(deltas)

    def _observe(self, answer: Answer, deltas: Sequence[Delta], now: float) -> None:
        elapsed = now - answer.last_time
        answer.last_time = now
        most = max(len(delta.tokens) for delta in deltas)
        self._metrics.generated_tokens.inc(sum(len(delta.tokens) for delta in deltas))
        if not answer.has_started:
            answer.has_started = True
            self.starts.add(now)
            self._metrics.first_token.observe(elapsed)
            return
        for _ in range(most):
            self._metrics.between_tokens.observe(elapsed / most)

    def _stop(self) -> None:
        self._is_stopping = True

    def _end(self, failure: BaseException, error: ApiError) -> None:
        with self._lock:
            self.failure = failure
        for answer in self._answers:
            answer.send(error)
        # Callers whose command will not run wait for its result.
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait().fail(error)


class _Command(NamedTuple):
    """A call on the engine's thread, and where its result goes; None: nobody waits for it."""

    run: Callable[[], Any]
    result: "asyncio.Future[Any] | None"

    def execute(self) -> None:
        """Runs it; the caller gets an error of its request, any other one ends the thread too."""
        try:
            value = self.run()
        except MegalodonError as error:
            self.fail(error)
        except BaseException:
            self.fail(_failed())
            raise
        else:
            self._resolve(lambda future: future.set_result(value))

    def fail(self, error: Exception) -> None:
        """Hands an error to the caller."""
        self._resolve(lambda future: future.set_exception(error))

    def _resolve(self, settle: Callable[["asyncio.Future[Any]"], None]) -> None:
        result = self.result
        if result is None:
            return

        def resolve() -> None:
            if not result.done():
                settle(result)

        with contextlib.suppress(RuntimeError):
            result.get_loop().call_soon_threadsafe(resolve)


def _failed() -> ApiError:
    return ApiError(503, "the engine has failed; the server's log says why", code="engine_failed")
