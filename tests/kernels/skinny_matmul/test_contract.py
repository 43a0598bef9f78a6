"""Contract of products of a few rows over all implementations, against NumPy in float64."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.skinny_matmul import (
    Epilogue,
    Int8Matrix,
    Part,
    RowNorm,
    skinny_matmul,
    sum_weights,
)
from pallas_kernels.skinny_matmul.api import IMPLEMENTATIONS
from pallas_kernels.skinny_matmul.block_sizes import TensorCoreTiling, WideTiling
from pallas_kernels.skinny_matmul.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.skinny_matmul.xla import normalize

EPS = 1e-3


pytestmark = pytest.mark.usefixtures("runnable")


def silu(x):
    return x / (1 + np.exp(-x))


def in_numpy(x, weights, norm, bias, activation, scale, added):
    """The definition; x and weights as the product takes them, in float64."""
    if norm == "layer":
        x = x - x.mean(1, keepdims=True)
    if norm is not None:
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + EPS)
    y = x @ weights.T + bias
    if activation == "silu":
        y = silu(y)
    if activation == "swiglu":
        hidden, gate = np.split(y, 2, axis=1)
        y = silu(hidden) * gate
    return y * scale + added.sum(0)


def make(rows, in_features, out_features, activation, seed=0):
    rng = np.random.default_rng(seed)
    width = out_features // 2 if activation == "swiglu" else out_features
    x = rng.normal(size=(rows, in_features)) + 0.3
    weights = rng.normal(size=(out_features, in_features)) / np.sqrt(in_features)
    vectors = rng.normal(size=out_features), rng.normal(size=width)
    return x, weights, *vectors, rng.normal(size=(2, rows, width))


@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "norm", "activation"),
    [
        (1, 256, 24, None, None),
        (2, 768, 16, "rms", "silu"),
        (3, 512, 48, "layer", None),
        (4, 256, 16, "layer", "swiglu"),
        # Two steps of columns, the last one shorter.
        (2, 2816, 8, "layer", "silu"),
        # Tensor cores; two steps of columns, rows that are filled up.
        (8, 256, 48, None, None),
        (8, 1280, 32, "layer", "silu"),
        (5, 512, 16, "rms", None),
        (16, 1536, 32, "rms", "swiglu"),
        (11, 256, 48, "layer", "swiglu"),
        # wgmma; rows that are filled up.
        (33, 256, 24, None, "silu"),
        (17, 256, 48, "rms", "swiglu"),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation, rows, in_features, out_features, norm, activation):
    operands = make(rows, in_features, out_features, activation)
    x, weights = (jnp.asarray(a, jnp.bfloat16) for a in operands[:2])
    bias, scale, added = (jnp.asarray(a, jnp.float32) for a in operands[2:])
    (y,) = jax.jit(
        lambda x, weights: skinny_matmul(
            x,
            weights,
            parts=[Part(scale.shape[0], jnp.float32)],
            norm=None if norm is None else RowNorm(norm, EPS),
            epilogue=Epilogue(bias, activation, scale, list(added)),
            implementation=implementation,
        )
    )(x, weights)
    exact = in_numpy(
        np.asarray(x, np.float64), np.asarray(weights, np.float64), norm, bias, activation, scale,
        np.asarray(added, np.float64),
    )  # fmt: skip
    error = np.linalg.norm(np.asarray(y) - exact) / np.linalg.norm(exact)
    # Without a norm nothing is rounded but the sums; with one the rows may be.
    assert error <= (1e-6 if norm is None else 2.5e-3)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("rows", [2, 8])
def test_the_kernel_rounds_no_float32_row(rows, norm):
    operands = make(rows, 512, 16, None)
    weights = jnp.asarray(operands[1], jnp.bfloat16)
    x = jnp.asarray(operands[0], jnp.float32)
    (y,) = skinny_matmul(
        x,
        weights,
        parts=[Part(16, jnp.float32)],
        norm=RowNorm(norm, EPS),
        implementation="mosaic_gpu",
    )
    exact = in_numpy(
        np.asarray(x, np.float64), np.asarray(weights, np.float64), norm, 0, None, 1, np.zeros(1)
    )
    # The tensor cores take a float32 number as two of bfloat16, which have 16 bits together.
    error = 1e-6 if rows <= 4 else 4e-6
    assert np.linalg.norm(np.asarray(y) - exact) <= error * np.linalg.norm(exact)


@pytest.mark.parametrize("norm", [None, "layer"])
def test_more_float32_rows_are_rounded_after_their_norm(norm):
    operands = make(24, 512, 16, None)
    weights = jnp.asarray(operands[1], jnp.bfloat16)
    x = jnp.asarray(operands[0] + 3, jnp.float32)
    (y,) = skinny_matmul(
        x,
        weights,
        parts=[Part(16, jnp.float32)],
        norm=norm and RowNorm(norm, EPS),
        implementation="mosaic_gpu",
    )
    rounded = (normalize(x, RowNorm(norm, EPS)) if norm else x).astype(jnp.bfloat16)
    exact = np.asarray(rounded, np.float64) @ np.asarray(weights, np.float64).T
    assert np.linalg.norm(np.asarray(y) - exact) <= 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_float64(implementation, norm):
    x, weights, bias, scale, added = make(3, 7, 5, None)
    with jax.enable_x64(True):
        (y,) = skinny_matmul(
            jnp.asarray(x),
            jnp.asarray(weights),
            parts=[Part(5, jnp.float64)],
            norm=None if norm is None else RowNorm(norm, EPS),
            epilogue=Epilogue(jnp.asarray(bias), None, jnp.asarray(scale), list(added)),
            implementation=implementation,
        )
    exact = in_numpy(x, weights, norm, bias, None, scale, added)
    np.testing.assert_allclose(y, exact, rtol=1e-12)


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_int8(implementation, rows, norm):
    rng = np.random.default_rng(3)
    values, scale = rng.integers(-127, 128, (16, 512), dtype=np.int8), rng.random(16) / 100
    x = jnp.asarray(rng.normal(size=(rows, 512)), jnp.bfloat16)
    (y,) = skinny_matmul(
        x,
        Int8Matrix(jnp.asarray(values), jnp.asarray(scale, jnp.float32)),
        parts=[Part(16, jnp.float32)],
        norm=None if norm is None else RowNorm(norm, EPS),
        implementation=implementation,
    )
    weights = values * scale[:, None]
    exact = in_numpy(np.asarray(x, np.float64), weights, norm, 0, None, 1, np.zeros(1))
    error = np.linalg.norm(np.asarray(y) - exact) / np.linalg.norm(exact)
    assert error <= (1e-6 if norm is None else 2.5e-3)


@pytest.mark.parametrize(
    ("implementation", "rows"), [*product(IMPLEMENTATIONS, [3, 8]), ("mosaic_gpu", 17)]
)
def test_parts_share_the_output_features(implementation, rows):
    x, weights, bias, *_ = make(rows, 256, 80, None)
    x, weights = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weights, jnp.bfloat16)
    multiply = partial(
        skinny_matmul,
        x,
        weights,
        epilogue=Epilogue(jnp.asarray(bias, jnp.float32)),
        implementation=implementation,
    )
    (whole,) = multiply(parts=[Part(80, jnp.float32)])
    parts = [
        Part(16, jnp.float32),
        Part(16, jnp.float32, is_swapped=True),
        Part(48, jnp.bfloat16),
        Part(16, jnp.float32),
    ]
    first, swapped, second, third = multiply(parts=parts)
    np.testing.assert_array_equal(first, whole[:, :16])
    np.testing.assert_array_equal(swapped, whole[:, np.arange(16) ^ 1])
    np.testing.assert_array_equal(second, whole[:, 16:64].astype(jnp.bfloat16))
    np.testing.assert_array_equal(third, whole[:, 64:])
    assert second.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("implementation", "rows"), [*product(IMPLEMENTATIONS, [3, 12]), ("mosaic_gpu", 33)]
)
def test_rows_are_independent(implementation, rows):
    x, weights, *_ = make(rows, 256, 16, None)
    x, weights = jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.bfloat16)
    multiply = partial(
        skinny_matmul,
        parts=[Part(16, jnp.float32)],
        norm=RowNorm("layer", EPS),
        implementation=implementation,
    )
    (plain,), (disturbed,) = multiply(x, weights), multiply(x.at[1].set(jnp.nan), weights)
    others = np.arange(rows) != 1
    np.testing.assert_array_equal(plain[others], disturbed[others])
    assert np.isnan(disturbed[1]).all()


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("features", [8, 16])
def test_few_rows_on_tensor_cores(features, rows):
    x, weights, bias, scale, added = make(rows, 512, 32, None)
    x, weights = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weights, jnp.bfloat16)
    vectors = (jnp.asarray(a, jnp.float32) for a in (bias, scale, added))
    bias, scale, added = vectors
    y, swapped = mosaic_gpu.skinny_matmul(
        x,
        weights,
        RowNorm("layer", EPS),
        Epilogue(bias, "silu", scale, list(added)),
        [Part(32, jnp.float32), Part(32, jnp.float32, is_swapped=True)],
        jnp.dtype(jnp.bfloat16),
        tiling=TensorCoreTiling(tiles=3, features=features),
    )
    exact = in_numpy(
        np.asarray(x, np.float64), np.asarray(weights, np.float64), "layer", bias, "silu", scale,
        np.asarray(added, np.float64),
    )  # fmt: skip
    assert np.linalg.norm(np.asarray(y) - exact) <= 1e-5 * np.linalg.norm(exact)
    np.testing.assert_array_equal(swapped, y[:, np.arange(32) ^ 1])


@pytest.mark.parametrize(
    ("rows", "tiling", "is_int8"),
    [
        # Shares of 2 and 3 steps through a ring of 2 stages; tiles of 64 and 16 output features.
        (40, WideTiling(features=64, splits=8, stages=2), False),
        (64, WideTiling(features=48, splits=2, stages=3), True),
    ],
)
def test_blocks_of_a_cluster_share_columns_and_rows(rows, tiling, is_int8):
    features = tiling.features
    x, weights, bias, scale, added = make(rows, 1280, features, None)
    x = jnp.asarray(x, jnp.bfloat16)
    if is_int8:
        values = np.round(weights * 900).clip(-127, 127)
        matrix = Int8Matrix(jnp.asarray(values, jnp.int8), jnp.full(features, 1 / 900, jnp.float32))
        weights = values / 900
    else:
        matrix = jnp.asarray(weights, jnp.bfloat16)
        weights = np.asarray(matrix, np.float64)
    bias, scale, added = (jnp.asarray(a, jnp.float32) for a in (bias, scale, added))
    y, swapped = mosaic_gpu.skinny_matmul(
        x,
        matrix,
        RowNorm("layer", EPS),
        Epilogue(bias, "silu", scale, list(added)),
        [Part(features, jnp.float32), Part(features, jnp.float32, is_swapped=True)],
        jnp.dtype(jnp.bfloat16),
        sum_weights(matrix),
        tiling=tiling,
    )
    exact = in_numpy(
        np.asarray(x, np.float64), weights, "layer", bias, "silu", scale,
        np.asarray(added, np.float64),
    )  # fmt: skip
    assert np.linalg.norm(np.asarray(y) - exact) <= 4e-6 * np.linalg.norm(exact)
    np.testing.assert_array_equal(swapped, y[:, np.arange(features) ^ 1])


@pytest.mark.parametrize(("rows", "activation"), [(3, None), (8, "swiglu"), (17, "swiglu")])
def test_the_kernels_take_sums_of_weights(rows, activation):
    """LayerNorm's result for sums that are 1 too large: r (x Wᵀ - μ (1 + Σ_k W_k))."""
    x, weights, bias, *_ = make(rows, 256, 16, activation)
    x, weights = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weights, jnp.bfloat16)
    (y,) = skinny_matmul(
        x,
        weights,
        parts=[Part(16 if activation is None else 8, jnp.float32)],
        norm=RowNorm("layer", EPS),
        epilogue=Epilogue(jnp.asarray(bias, jnp.float32), activation),
        weight_sums=1 + sum_weights(weights),
        implementation="mosaic_gpu",
    )
    rows64, weights64 = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    shift = rows64.mean(1) / np.sqrt(rows64.var(1) + EPS)
    exact = in_numpy(rows64, weights64, "layer", bias - shift[:, None], activation, 1, np.zeros(1))
    assert np.linalg.norm(np.asarray(y) - exact) <= 4e-6 * np.linalg.norm(exact)
