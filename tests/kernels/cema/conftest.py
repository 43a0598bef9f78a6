"""Shared by the tests of CEMA: random cases, gradients of everything, relative errors."""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.common.target import find_target, interpreted, is_interpreted

# Rows x tokens x orders that a kernel's interpreter runs in a few seconds.
INTERPRETED_WORK = 700


class Case(NamedTuple):
    """Inputs of one call (params as a tuple) and cotangents of its results, float64 numpy."""

    x: np.ndarray
    params: Any
    initial_state: np.ndarray | None
    segment_ids: np.ndarray | None
    cot_y: np.ndarray
    cot_state: np.ndarray


def _make_case(
    rows: int,
    length: int,
    channels: int,
    order: int,
    *,
    with_state: bool = False,
    segment_ids: np.ndarray | None = None,
    seed: int = 0,
) -> Case:
    rng = np.random.default_rng(seed)

    def normal(*shape: int, mean: float = 0.0) -> np.ndarray:
        return rng.normal(mean, 1.0, shape).astype(np.float32).astype(np.float64)

    def complex_normal(*shape: int) -> np.ndarray:
        return normal(*shape) + 1j * normal(*shape)

    alpha, delta = normal(channels, order), normal(channels, order, mean=-2.0)
    theta, gamma = normal(channels, mean=-1.0), normal(channels, order, 2)
    return Case(
        x=normal(rows, length, channels),
        params=(alpha, delta, theta, gamma, normal(channels)),
        initial_state=complex_normal(rows, channels, order) if with_state else None,
        segment_ids=segment_ids,
        cot_y=normal(rows, length, channels),
        cot_state=complex_normal(rows, channels, order),
    )


@cache
def _compiled_pass(llvm_level: int, options: tuple, interpret: bool) -> Callable[..., Any]:
    """Forward and backward pass, compiled once for all cases of one shape."""
    del interpret  # part of the cache's key: tracing depends on it

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": llvm_level})
    def run(x, params, initial_state, segment_ids, cotangents):
        def forward(x, params, initial_state):
            return cema(
                x, params, initial_state=initial_state, segment_ids=segment_ids, **dict(options)
            )

        out, pull_back = jax.vjp(forward, x, params, initial_state)
        return out, pull_back(type(out)(*cotangents))

    return run


# LLVM level 0 compiles three times faster, and compilation is most of a test.
def _outputs_and_gradients(
    case: Case, dtype: Any, *, llvm_level: int = 0, **options: Any
) -> dict[str, np.ndarray]:
    with jax.enable_x64(dtype == jnp.float64):
        complex_dtype = jnp.result_type(dtype, jnp.complex64)
        segment_ids = None if case.segment_ids is None else jnp.asarray(case.segment_ids, jnp.int32)
        cotangents = (jnp.asarray(case.cot_y, dtype), jnp.asarray(case.cot_state, complex_dtype))
        state = None if case.initial_state is None else case.initial_state.astype(complex_dtype)
        params = CemaParams(*(jnp.asarray(value, dtype) for value in case.params))
        run = _compiled_pass(llvm_level, tuple(options.items()), is_interpreted())
        out, (dx, dparams, dstate) = run(
            jnp.asarray(case.x, dtype), params, state, segment_ids, cotangents
        )
        results = {"y": out.y, "final_state": out.final_state, "dx": dx}
        results |= {f"d{name}": value for name, value in dparams._asdict().items()}
        if dstate is not None:
            results["dinitial_state"] = dstate
        return {name: np.asarray(value) for name, value in results.items()}


def _relative_error(got: np.ndarray, want: np.ndarray) -> float:
    norm = np.linalg.norm(want)
    return float(np.linalg.norm(got.astype(want.dtype) - want) / (norm if norm else 1.0))


@pytest.fixture(autouse=True)
def runnable(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test of kernels on their device, else in their interpreter if it is small enough.

    The parameters `rows`, `length` and `order` of a test say how large it is.
    """
    arguments = getattr(getattr(request.node, "callspec", None), "params", {})
    platforms = {"mosaic_gpu": "gpu", "pallas_tpu": "tpu", "triton": "gpu"}
    platform = platforms.get(arguments.get("implementation"))
    if arguments.get("implementation") == "triton":
        pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    if platform is None or platform == find_target().platform:
        yield
        return
    # Kernels compute whole tiles.
    sizes = {**arguments, "length": max(arguments.get("length", 1), 64)}
    work = math.prod(sizes.get(name, 1) for name in ("rows", "length", "order"))
    device_only = request.node.get_closest_marker("device_only") is not None
    if work > INTERPRETED_WORK or device_only:
        pytest.skip(f"too long for an interpreter; needs a {platform}")
    with interpreted():
        yield


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """Random inputs with decays from fast to slow."""
    return _make_case


@pytest.fixture
def outputs_and_gradients() -> Callable[..., dict[str, np.ndarray]]:
    """Results of `cema(**options)`, and gradients of Σ y·cot_y + Re Σ final_state·cot_state."""
    return _outputs_and_gradients


@pytest.fixture
def relative_error() -> Callable[[np.ndarray, np.ndarray], float]:
    """Relative L2 error."""
    return _relative_error
