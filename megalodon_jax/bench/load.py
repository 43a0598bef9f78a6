"""A Poisson load: requests arrive by a clock, one thread steps the engine; latencies of a user.

Times of a request count from its arrival, not from the moment when the thread hands it over.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from megalodon_jax.inference.requests import Request, Stream
from megalodon_jax.inference.sampling import SamplingParams

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
# The thread sleeps no longer than this while the engine is idle.
_NAP = 1e-3


class Arrival(NamedTuple):
    """A request, and when it arrives.

    Attributes:
      seconds: after the load's start.
      prompt: token ids (n,).
      answer: tokens of the answer.
    """

    seconds: float
    prompt: np.ndarray
    answer: int

    def request(self) -> Request:
        """A greedy request that ends after its number of tokens."""
        params = SamplingParams(temperature=0.0, max_tokens=self.answer)
        return Request(prompt=self.prompt, params=params)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Log-uniform lengths of prompts and answers, ends included."""

    prompt: tuple[int, int]
    answer: tuple[int, int]

    def draw(self, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """Lengths of some requests: prompt, answer."""
        prompts, answers = (_log_uniform(rng, each, count) for each in (self.prompt, self.answer))
        return list(zip(prompts, answers, strict=True))


def draw_arrivals(
    rng: np.random.Generator, lengths: Lengths, *, rate: float, seconds: float, vocab_size: int
) -> list[Arrival]:
    """A Poisson process: exponential gaps, independent lengths, random ids.

    Args:
      rng: of all draws.
      lengths: of prompts and answers.
      rate: requests a second.
      seconds: duration.
      vocab_size: ids are below it.
    """
    times: list[float] = []
    now = rng.exponential(1 / rate)
    while now < seconds:
        times.append(now)
        now += rng.exponential(1 / rate)
    return [
        Arrival(at, rng.integers(0, vocab_size, prompt, dtype=np.int32), answer)
        for at, (prompt, answer) in zip(times, lengths.draw(rng, len(times)), strict=True)
    ]


class LoadedEngine(Protocol):
    """Interface of `inference.engine.Engine` that a load needs."""

    @property
    def is_idle(self) -> bool: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    def submit(self, request: Request) -> Stream: ...

    def step(self) -> None: ...

    def cancel(self, stream: Stream) -> None: ...

    def run(self) -> None: ...


class Percentiles(NamedTuple):
    """Median and 95th percentile in seconds; NaN without measurements."""

    p50: float
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Percentiles":
        """The percentiles of some measurements."""
        if not seconds:
            return cls(float("nan"), float("nan"))
        return cls(*(float(value) for value in np.percentile(seconds, (50, 95))))


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """Results of a load, without its first part.

    Attributes:
      seconds: that count.
      arrived: requests that arrived in them.
      offered: tokens of their answers.
      finished: requests that ended in these seconds.
      tokens: tokens that reached the host.
      first_token: seconds from arrival to the first token.
      per_token: mean seconds between a request's tokens, of requests that ended.
      between_reads: seconds between two reads that brought a request new tokens: a block of steps
        brings several at once.
      waiting: requests in the queue or in prefill before a step, mean over the time.
      most_waiting: the most of them.
      running: requests in slots before a step, mean over the time.
      compilations: programs that were compiled, from the load's start on.
    """

    seconds: float
    arrived: int
    offered: int
    finished: int
    tokens: int
    first_token: Percentiles
    per_token: Percentiles
    between_reads: Percentiles
    waiting: float
    most_waiting: int
    running: float
    compilations: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers."""
        return self.tokens / self.seconds

    @property
    def offered_per_second(self) -> float:
        """Tokens of the answers of the requests that arrived."""
        return self.offered / self.seconds


@dataclasses.dataclass
class _Running:
    """A request on its way.

    Attributes:
      arrival: the request.
      stream: its tokens.
      seen: tokens that were on the host after the last step.
      first: time of the first of them.
      last: time of the newest.
    """

    arrival: Arrival
    stream: Stream
    seen: int = 0
    first: float = 0.0
    last: float = 0.0


class _Queues(NamedTuple):
    """Requests that wait and run, for some seconds."""

    seconds: float
    waiting: int
    running: int


class _Recorder:
    """Collects times of tokens from `start` on."""

    def __init__(self, start: float):
        self.start = start
        self.first_token: list[float] = []
        self.per_token: list[float] = []
        self.between_reads: list[float] = []
        self.queues: list[_Queues] = []
        self.tokens = self.finished = 0

    def observe(self, request: _Running, now: float) -> None:
        """Notes a request's new tokens."""
        count = len(request.stream.tokens)
        new, is_counted = count - request.seen, now >= self.start
        if new:
            if request.seen == 0:
                request.first = now
                if is_counted:
                    self.first_token.append(now - request.arrival.seconds)
            elif is_counted:
                self.between_reads.append(now - request.last)
            request.seen, request.last = count, now
            self.tokens += new if is_counted else 0
        if request.stream.is_finished and is_counted:
            self.finished += 1
            if count > 1:
                self.per_token.append((request.last - request.first) / (count - 1))

    def observe_queues(self, queues: "_Queues", now: float) -> None:
        """Notes the requests before a step that has ended now."""
        if now >= self.start:
            self.queues.append(queues)

    def mean(self, name: str) -> float:
        """A field of the queues, mean over the time."""
        total = sum(each.seconds for each in self.queues)
        if not total:
            return 0.0
        return sum(getattr(each, name) * each.seconds for each in self.queues) / total


def run_load(
    engine: LoadedEngine,
    arrivals: Sequence[Arrival],
    *,
    seconds: float,
    skip: float = 0.2,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Any] = time.sleep,
) -> LoadResult:
    """Runs a load in real time; what is left at its end is cancelled.

    Args:
      engine: idle, compiled, with a queue for all arrivals.
      arrivals: requests by increasing time.
      seconds: duration.
      skip: share of the duration that is not counted, while slots fill.
      clock: seconds from any start.
      sleep: waits for some seconds.
    """
    start = skip * seconds
    recorder = _Recorder(start)
    waiting = collections.deque(arrivals)
    running: list[_Running] = []
    with count_compilations() as compilations:
        began = clock()
        while (now := clock() - began) < seconds:
            while waiting and waiting[0].seconds <= now:
                arrival = waiting.popleft()
                running.append(_Running(arrival, engine.submit(arrival.request())))
            waits, runs = engine.num_waiting, engine.num_running
            if engine.is_idle:
                next_arrival = waiting[0].seconds if waiting else seconds
                sleep(min(_NAP, max(0.0, next_arrival - now)))
            else:
                engine.step()
            before, now = now, clock() - began
            recorder.observe_queues(_Queues(now - before, waits, runs), now)
            for request in running:
                recorder.observe(request, now)
            running = [request for request in running if not request.stream.is_finished]
        for request in running:
            engine.cancel(request.stream)
        engine.run()
    counted = [arrival for arrival in arrivals if arrival.seconds >= start]
    return LoadResult(
        # The last step may end after the load's end.
        seconds=max(now, seconds) - start,
        arrived=len(counted),
        offered=sum(arrival.answer for arrival in counted),
        finished=recorder.finished,
        tokens=recorder.tokens,
        first_token=Percentiles.of(recorder.first_token),
        per_token=Percentiles.of(recorder.per_token),
        between_reads=Percentiles.of(recorder.between_reads),
        waiting=recorder.mean("waiting"),
        most_waiting=max((each.waiting for each in recorder.queues), default=0),
        running=recorder.mean("running"),
        compilations=len(compilations),
    )


@contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that gets an entry for every program that XLA compiles inside."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == _COMPILE_EVENT:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _log_uniform(rng: np.random.Generator, ends: tuple[int, int], count: int) -> list[int]:
    low, high = ends
    exponents = rng.uniform(np.log(low), np.log(high + 1), count)
    return np.clip(np.exp(exponents).astype(int), low, high).tolist()
