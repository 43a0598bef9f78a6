"""The row operations against float64: results and every gradient, in both implementations."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rowwise
from pallas_kernels.common.target import find_target, interpreted
from pallas_kernels.rowwise import mosaic_gpu
from pallas_kernels.rowwise.mosaic_gpu.kernels import Shape

EPS = 1e-5


@pytest.fixture(autouse=True)
def runnable() -> Iterator[None]:
    """Kernels run where they can, else in their interpreter."""
    if find_target().is_hopper:
        yield
        return
    with interpreted():
        yield


def exact_rms_norm(x, scale=None):
    y = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    return y if scale is None else y * scale


def exact_layer_norm(x, scale=None, bias=None, added=None, offset=None):
    z = x + (0 if added is None else added) + (0 if offset is None else offset)
    y = (z - z.mean(-1, keepdims=True)) / jnp.sqrt(z.var(-1, keepdims=True) + EPS)
    return y * (1 if scale is None else scale) + (0 if bias is None else bias)


def exact_silu(x, bias=None):
    z = x if bias is None else x + bias
    return z / (1 + jnp.exp(-z))


def exact_silu_gate(x, y, bias=None):
    return y * exact_silu(x, bias)


EXACT: dict[str, Callable[..., Any]] = {
    "rms_norm": exact_rms_norm,
    "layer_norm": exact_layer_norm,
    "silu": exact_silu,
    "silu_gate": exact_silu_gate,
}
VECTORS = ("scale", "bias", "offset")
FULL = {
    "rms_norm": ("x", "scale"),
    "layer_norm": ("x", "scale", "bias", "added", "offset"),
    "silu": ("x", "bias"),
    "silu_gate": ("x", "y", "bias"),
}


def make_inputs(names, rows: int, width: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=width), jnp.float32)
        if name in VECTORS
        else jnp.asarray(rng.normal(size=(rows, width)), jnp.bfloat16)
        for name in names
    }


def run(op: str, inputs: dict[str, Any], cotangent, implementation: str) -> dict[str, Any]:
    """The result and the gradients by name."""

    def apply(inputs):
        missing = {"rms_norm": ("scale",), "layer_norm": ("scale", "bias")}.get(op, ("bias",))
        options: dict[str, Any] = dict.fromkeys(missing) | inputs
        if op.endswith("norm"):
            options["eps"] = EPS
        function = getattr(rowwise, op)
        return function(**options, dtype=cotangent.dtype, implementation=implementation)

    y, pull_back = jax.vjp(apply, inputs)
    return {"result": y} | pull_back(cotangent)[0]


def run_exactly(op: str, inputs: dict[str, Any], cotangent) -> dict[str, Any]:
    with jax.enable_x64(True):
        wide, cotangent = jax.tree.map(lambda a: a.astype(jnp.float64), (inputs, cotangent))
        y, pull_back = jax.vjp(lambda inputs: EXACT[op](**inputs), wide)
        return jax.tree.map(np.asarray, {"result": y} | pull_back(cotangent)[0])


def check(got: dict[str, Any], exact: dict[str, Any]) -> None:
    """Rows have the error of one rounding, vectors that of float32 sums."""
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        value = np.asarray(got[name]).astype(np.float64)
        error = np.linalg.norm(value - expected)
        if got[name].dtype == jnp.bfloat16:
            rounded = expected.astype(jnp.bfloat16).astype(np.float64)
            assert error <= 1.02 * np.linalg.norm(rounded - expected), name
        else:
            assert error <= 1e-6 * np.linalg.norm(expected), name


@pytest.mark.parametrize(
    ("op", "names", "rows", "width"),
    [
        *((op, names, 37, 128) for op, names in FULL.items()),
        ("layer_norm", FULL["layer_norm"], 5, 384),
        ("rms_norm", FULL["rms_norm"], 3, 1024),
        ("layer_norm", ("x",), 5, 384),
        ("layer_norm", ("x", "bias", "added"), 5, 384),
        ("rms_norm", ("x",), 5, 384),
        ("silu", ("x",), 5, 384),
        ("silu_gate", ("x", "y"), 5, 384),
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_results_and_gradients(implementation, op, names, rows, width):
    inputs = make_inputs(names, rows, width)
    cotangent = make_inputs(("dy",), rows, width, seed=1)["dy"]
    check(run(op, inputs, cotangent, implementation), run_exactly(op, inputs, cotangent))


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_float32_results_of_bfloat16_rows(implementation):
    inputs = make_inputs(FULL["silu_gate"], 3, 128)
    cotangent = make_inputs(("dy",), 3, 128, seed=1)["dy"].astype(jnp.float32)
    got = run("silu_gate", inputs, cotangent, implementation)
    assert got["result"].dtype == jnp.float32
    check(got, run_exactly("silu_gate", inputs, cotangent))


@pytest.mark.parametrize(
    "shape",
    [Shape(128, 2, 3), Shape(128, 4, 2, keep_vectors=False, ahead=False), Shape(128, 1, 2)],
)
def test_blocks_of_many_rows(shape):
    """Several steps, a last one that is not full, and sums over blocks."""
    inputs = make_inputs(FULL["layer_norm"], 19, 128)
    cotangent = make_inputs(("dy",), 19, 128, seed=1)["dy"]

    def apply(inputs):
        return mosaic_gpu.apply(
            mosaic_gpu.LayerNorm(128, EPS),
            (inputs["x"], inputs["added"]),
            (inputs["offset"], inputs["scale"], inputs["bias"]),
            dtype=jnp.bfloat16,
            forward=shape,
            backward=shape,
        )

    y, pull_back = jax.vjp(apply, inputs)
    got = {"result": y} | pull_back(cotangent)[0]
    check(got, run_exactly("layer_norm", inputs, cotangent))


def test_columns_of_a_gate_are_cut_into_tiles():
    inputs = make_inputs(FULL["silu_gate"], 5, 384)
    cotangent = make_inputs(("dy",), 5, 384, seed=1)["dy"]

    def apply(inputs):
        return mosaic_gpu.apply(
            mosaic_gpu.SiluGate(),
            (inputs["x"], inputs["y"]),
            (inputs["bias"],),
            dtype=jnp.bfloat16,
            forward=Shape(128, 2, 6),
            backward=Shape(128, 2, 6),
        )

    y, pull_back = jax.vjp(apply, inputs)
    got = {"result": y} | pull_back(cotangent)[0]
    check(got, run_exactly("silu_gate", inputs, cotangent))


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_a_large_mean_does_not_eat_the_variance(implementation):
    inputs = make_inputs(("x",), 3, 128) | {"offset": jnp.full(128, 1000.0)}
    cotangent = make_inputs(("dy",), 3, 128, seed=1)["dy"]
    got = run("layer_norm", inputs, cotangent, implementation)
    exact = run_exactly("layer_norm", inputs, cotangent)
    # mean(z^2) - mean(z)^2 would be off by a tenth; z itself is rounded to 2^-15 here.
    np.testing.assert_allclose(np.asarray(got["result"], np.float64), exact["result"], atol=2e-2)
    np.testing.assert_allclose(np.asarray(got["x"], np.float64), exact["x"], atol=2e-2)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_gates_saturate(implementation):
    x = jnp.asarray([[-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, 3.0, -3.0] * 16], jnp.bfloat16)
    got = run("silu", {"x": x}, jnp.ones_like(x), implementation)
    x = np.asarray(x, np.float64)
    expected = np.where(x > 80, x, np.where(x < -80, 0, x / (1 + np.exp(-np.clip(x, -80, 80)))))
    np.testing.assert_allclose(np.asarray(got["result"], np.float64), expected, rtol=1e-2)
    assert np.isfinite(np.asarray(got["x"], np.float64)).all()


def test_rows_do_not_mix():
    inputs = make_inputs(FULL["layer_norm"], 5, 128)
    cotangent = make_inputs(("dy",), 5, 128, seed=1)["dy"]
    apply = partial(run, "layer_norm", cotangent=cotangent, implementation="mosaic_gpu")
    spoiled = inputs | {"x": inputs["x"].at[2].set(jnp.nan)}
    others = np.array([0, 1, 3, 4])
    clean, dirty = apply(inputs), apply(spoiled)
    for name in ("result", "x", "added"):
        assert np.isnan(np.asarray(dirty[name])[2].astype(np.float32)).all()
        np.testing.assert_array_equal(
            np.asarray(clean[name])[others], np.asarray(dirty[name])[others]
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_xla_computes_in_the_type_of_wide_rows(dtype):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, scale = rng.normal(size=(2, 3, 10)), rng.normal(size=10)
        y = rowwise.rms_norm(jnp.asarray(x, dtype), jnp.asarray(scale, dtype), eps=EPS, dtype=dtype)
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale
        assert y.dtype == dtype
        np.testing.assert_allclose(y, expected, rtol=1e-14 if dtype == jnp.float64 else 1e-6)
