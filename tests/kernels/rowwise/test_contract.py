"""Contract of the row operations, over all implementations: results and every gradient."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rowwise
from pallas_kernels.rowwise.mosaic_gpu.block_sizes import RowTiling
from pallas_kernels.rowwise.mosaic_gpu.kernels import LayerNorm, SiluGate
from pallas_kernels.rowwise.mosaic_gpu.op import apply as apply_kernels

EPS = 1e-5


pytestmark = pytest.mark.usefixtures("runnable")


IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu", "triton")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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


@partial(jax.jit, static_argnames=("op", "implementation"))
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
    """The reference in float64."""
    with jax.enable_x64(True):
        wide, cotangent = jax.tree.map(lambda a: a.astype(jnp.float64), (inputs, cotangent))
        return jax.tree.map(np.asarray, run(op, wide, cotangent, "reference"))


def check(got: dict[str, Any], exact: dict[str, Any]) -> None:
    """Rows have the error of one rounding, gradients of vectors that of float32 sums."""
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
@each_implementation
def test_results_and_gradients(implementation, op, names, rows, width):
    inputs = make_inputs(names, rows, width)
    cotangent = make_inputs(("dy",), rows, width, seed=1)["dy"]
    check(run(op, inputs, cotangent, implementation), run_exactly(op, inputs, cotangent))


@each_implementation
def test_float32_results_of_bfloat16_rows(implementation):
    inputs = make_inputs(FULL["silu_gate"], 3, 128)
    cotangent = make_inputs(("dy",), 3, 128, seed=1)["dy"].astype(jnp.float32)
    got = run("silu_gate", inputs, cotangent, implementation)
    assert got["result"].dtype == jnp.float32
    check(got, run_exactly("silu_gate", inputs, cotangent))


@pytest.mark.parametrize(
    "tiling",
    [
        RowTiling(128, 2, 3),
        RowTiling(128, 4, 2, vectors_in_registers=False, prefetch=False),
        RowTiling(128, 1, 2),
    ],
)
def test_blocks_of_many_rows(tiling):
    """Several steps, a last one that is not full, and sums over blocks."""
    inputs = make_inputs(FULL["layer_norm"], 19, 128)
    cotangent = make_inputs(("dy",), 19, 128, seed=1)["dy"]

    def apply(inputs):
        return apply_kernels(
            LayerNorm(128, EPS),
            (inputs["x"], inputs["added"]),
            (inputs["offset"], inputs["scale"], inputs["bias"]),
            dtype=jnp.bfloat16,
            forward=tiling,
            backward=tiling,
        )

    @jax.jit
    def differentiate(inputs, cotangent):
        y, pull_back = jax.vjp(apply, inputs)
        return {"result": y} | pull_back(cotangent)[0]

    got = differentiate(inputs, cotangent)
    check(got, run_exactly("layer_norm", inputs, cotangent))


def test_columns_of_a_gate_are_cut_into_tiles():
    inputs = make_inputs(FULL["silu_gate"], 5, 384)
    cotangent = make_inputs(("dy",), 5, 384, seed=1)["dy"]

    def apply(inputs):
        return apply_kernels(
            SiluGate(),
            (inputs["x"], inputs["y"]),
            (inputs["bias"],),
            dtype=jnp.bfloat16,
            forward=RowTiling(128, 2, 6),
            backward=RowTiling(128, 2, 6),
        )

    @jax.jit
    def differentiate(inputs, cotangent):
        y, pull_back = jax.vjp(apply, inputs)
        return {"result": y} | pull_back(cotangent)[0]

    got = differentiate(inputs, cotangent)
    check(got, run_exactly("silu_gate", inputs, cotangent))


@each_implementation
def test_variance_survives_a_large_mean(implementation):
    inputs = make_inputs(("x",), 3, 128) | {"offset": jnp.full(128, 1000.0)}
    cotangent = make_inputs(("dy",), 3, 128, seed=1)["dy"]
    got = run("layer_norm", inputs, cotangent, implementation)
    exact = run_exactly("layer_norm", inputs, cotangent)
    # mean(z^2) - mean(z)^2 would be off by a tenth; z itself is rounded to 2^-15 here.
    np.testing.assert_allclose(np.asarray(got["result"], np.float64), exact["result"], atol=2e-2)
    np.testing.assert_allclose(np.asarray(got["x"], np.float64), exact["x"], atol=2e-2)


@each_implementation
def test_gates_saturate(implementation):
    x = jnp.asarray([[-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, 3.0, -3.0] * 16], jnp.bfloat16)
    got = run("silu", {"x": x}, jnp.ones_like(x), implementation)
    x = np.asarray(x, np.float64)
    expected = np.where(x > 80, x, np.where(x < -80, 0, x / (1 + np.exp(-np.clip(x, -80, 80)))))
    np.testing.assert_allclose(np.asarray(got["result"], np.float64), expected, rtol=1e-2)
    assert np.isfinite(np.asarray(got["x"], np.float64)).all()


def test_rows_are_independent():
    inputs = make_inputs(FULL["layer_norm"], 5, 128)
    cotangent = make_inputs(("dy",), 5, 128, seed=1)["dy"]
    apply = partial(run, "layer_norm", cotangent=cotangent, implementation="mosaic_gpu")
    with_nan = inputs | {"x": inputs["x"].at[2].set(jnp.nan)}
    others = np.array([0, 1, 3, 4])
    plain, disturbed = apply(inputs), apply(with_nan)
    for name in ("result", "x", "added"):
        assert np.isnan(np.asarray(disturbed[name])[2].astype(np.float32)).all()
        np.testing.assert_array_equal(
            np.asarray(plain[name])[others], np.asarray(disturbed[name])[others]
        )


def define_in_numpy(op: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The operation from its equation, in float64."""
    z = inputs["x"] + inputs.get("added", 0.0) + inputs.get("offset", 0.0)
    if op.startswith("silu"):
        z = z + inputs.get("bias", 0.0)
        return inputs.get("y", 1.0) * z / (1 + np.exp(-z))
    centered = z - z.mean(-1, keepdims=True) if op == "layer_norm" else z
    y = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + EPS)
    return y * inputs.get("scale", 1.0) + inputs.get("bias", 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("op", FULL)
def test_equations_hold_in_the_dtype_of_wide_rows(op, implementation, dtype):
    rng = np.random.default_rng(0)
    for names in (FULL[op], [name for name in FULL[op] if name in ("x", "y")]):
        shapes = {name: (10,) if name in VECTORS else (2, 3, 10) for name in names}
        inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        with jax.enable_x64(True):
            cast = {name: jnp.asarray(a, dtype) for name, a in inputs.items()}
            y = run(op, cast, jnp.zeros((2, 3, 10), dtype), implementation)["result"]
        assert y.dtype == dtype
        tolerance = 1e-14 if dtype == jnp.float64 else 1e-6
        expected = define_in_numpy(op, inputs)
        np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
