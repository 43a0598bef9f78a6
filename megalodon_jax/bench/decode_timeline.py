"""Where the time to a first token goes: the host's calls beside the device's kernels."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData, ProfileOptions, TraceAnnotation

from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import Request

_REQUEST = "first_token_request"


class Timeline(NamedTuple):
    """One traced request; times in seconds after `Engine.submit` begins. Tracing itself adds some.

    Attributes:
      called: the first jitted function is called.
      returned: the last one before the token returns.
      programs: calls of jitted functions.
      transfers: arrays that go to the device.
      first_kernel: the first kernel or copy on the device begins; None without a GPU.
      last_kernel: the last one ends.
      busy: time in which a kernel or copy runs.
      launches: kernels and copies.
      token: the id is on the host.
    """

    called: float
    returned: float
    programs: int
    transfers: int
    first_kernel: float | None
    last_kernel: float | None
    busy: float
    launches: int
    token: float

    def __str__(self) -> str:
        calls = (
            f"  {self.programs} programs and {self.transfers} transfers called from "
            f"{self.called * 1e3:.3f} ms, returned at {self.returned * 1e3:.3f}"
        )
        if self.first_kernel is None or self.last_kernel is None:
            return f"{calls}; token at {self.token * 1e3:.3f}"
        return (
            f"{calls}; {self.launches} kernels from {self.first_kernel * 1e3:.3f} to "
            f"{self.last_kernel * 1e3:.3f}, busy {self.busy * 1e3:.3f}; "
            f"token at {self.token * 1e3:.3f}"
        )


class _Span(NamedTuple):
    start: float
    end: float
    name: str


def trace_first_token(engine: Engine, request: Request) -> Timeline:
    """Traces a request of an idle engine up to its first token, and cancels it.

    Args:
      engine: the engine; a request of this kind has compiled its programs.
      request: the request.
    """
    options = ProfileOptions()
    # Python's own calls would take longer to record than to run.
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            with TraceAnnotation(_REQUEST):
                stream = engine.submit(request)
                while not stream.tokens:
                    engine.step()
            engine.cancel(stream)
            engine.run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        host, device = read_spans(file)
    return _timeline(host, device)


def read_spans(file: Path) -> tuple[list[_Span], list[_Span]]:
    """Events of the host's Python thread and of the GPUs' streams in a trace, by start."""
    host, device = [], []
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            if "device:GPU" in plane.name and "Stream" in line.name:
                target = device
            elif plane.name == "/host:CPU" and line.name.startswith("python"):
                target = host
            else:
                continue
            target.extend(
                _Span(event.start_ns * 1e-9, event.end_ns * 1e-9, event.name)
                for event in line.events
            )
    return sorted(host), sorted(device)


def jitted_calls(host: list[_Span]) -> list[_Span]:
    """Outermost calls of jitted functions: each is traced twice, one inside the other."""
    calls: list[_Span] = []
    for span in host:
        if span.name.startswith("PjitFunction") and (not calls or span.start >= calls[-1].end):
            calls.append(span)
    return calls


def _timeline(host: list[_Span], device: list[_Span]) -> Timeline:
    (request,) = (span for span in host if span.name == _REQUEST)

    def inside(spans: list[_Span]) -> list[_Span]:
        return [span for span in spans if request.start <= span.start < request.end]

    host, device = inside(host), inside(device)
    calls = jitted_calls(host)
    busy, end = 0.0, 0.0
    for span in device:
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return Timeline(
        called=calls[0].start - request.start,
        returned=calls[-1].end - request.start,
        programs=len(calls),
        transfers=sum(span.name == "DevicePut" for span in host),
        first_kernel=device[0].start - request.start if device else None,
        last_kernel=end - request.start if device else None,
        busy=busy,
        launches=len(device),
        token=request.end - request.start,
    )
