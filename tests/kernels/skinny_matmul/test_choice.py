"""Errors and choice of implementation of products of a few rows."""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.common.devices import HOPPER
from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.common.target import Target, find_target, interpreted
from pallas_kernels.skinny_matmul import Epilogue, Int8Matrix, Part, RowNorm, api, skinny_matmul
from pallas_kernels.skinny_matmul.block_sizes import choose_wide_tiling
from pallas_kernels.skinny_matmul.mosaic_gpu.operands import SkinnyOperands
from pallas_kernels.skinny_matmul.mosaic_gpu.wide_products import WideScratch

BF16, F32 = jnp.bfloat16, jnp.float32


def multiply(x=(2, 256), matrix=(16, 256), parts=((16, F32),), dtype=BF16, added=(),
             activation=None, weight_sums=None, implementation=None):  # fmt: skip
    operands = jnp.zeros(x, dtype), jnp.zeros(matrix, dtype), [jnp.zeros(a) for a in added]

    def f(x, matrix, added):
        return skinny_matmul(
            x,
            matrix,
            parts=[Part(*part) for part in parts],
            epilogue=Epilogue(None, activation, None, added),
            weight_sums=None if weight_sums is None else jnp.zeros(weight_sums),
            implementation=implementation,
        )

    return jax.eval_shape(f, *operands)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (2, 1, 256)}, r"shapes \(2, 1, 256\) and \(16, 256\); expected \(B, K\)"),
        ({"x": (2, 128)}, r"shapes \(2, 128\) and \(16, 256\)"),
        ({"parts": ((8, F32),)}, r"parts have 8 output features together; .* gives 16"),
        ({"activation": "swiglu"}, r"parts have 16 output features together; .* gives 8"),
        ({"activation": "relu"}, "activation is 'relu'; use 'silu', 'swiglu' or None"),
        ({"parts": ((16, F32, True),)}, "is swapped: needs a part of the same even width"),
        ({"parts": ((8, F32), (4, F32, True), (8, F32))}, "needs a part of the same even width"),
        ({"added": ((1, 16),)}, r"added has shape \(1, 16\); expected \(2, 16\)"),
        ({"weight_sums": (8,)}, r"weight_sums has shape \(8,\); expected \(16,\)"),
        ({"implementation": "cuda"}, "skinny_matmul has no implementation 'cuda'"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        multiply(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (65, 256)}, "takes 1 to 64 rows, x has 65"),
        ({"dtype": F32}, "takes products in bfloat16, these are of float32"),
        ({"x": (2, 128), "matrix": (16, 128)}, "needs a multiple of 256 input features"),
        ({"matrix": (12, 256), "parts": ((12, F32),)}, "parts of a multiple of 8"),
        (
            {"x": (8, 14080), "matrix": (16, 14080)},
            "8 output features in shared memory, 204800 bytes at most; here they take 225280",
        ),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_by_name(arguments, message):
    with interpreted(), pytest.raises(ValueError, match=message):
        multiply(**arguments, implementation="mosaic_gpu")


H200, A100 = Target("gpu", "NVIDIA H200"), Target("gpu", "NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize(
    ("target", "rows", "dtype", "choice"),
    [
        (H200, 2, BF16, "mosaic_gpu"),
        (H200, 4, BF16, "mosaic_gpu"),
        (H200, 16, BF16, "mosaic_gpu"),
        (H200, 17, BF16, "mosaic_gpu"),
        (H200, 64, BF16, "mosaic_gpu"),
        (H200, 65, BF16, "xla"),
        (H200, 2, F32, "xla"),
        (A100, 2, BF16, "xla"),
        (Target("tpu", "TPU v5p"), 2, BF16, "xla"),
        (Target("gpu", "several devices"), 2, BF16, "xla"),
    ],
)
@pytest.mark.parametrize("is_int8", [False, True])
def test_choice(target, rows, dtype, choice, is_int8, monkeypatch):
    monkeypatch.setattr(api, "find_target", lambda: target)
    x = jax.ShapeDtypeStruct((rows, 1024), dtype)
    matrix = jax.ShapeDtypeStruct((2048, 1024), jnp.int8 if is_int8 else dtype)
    if is_int8:
        matrix = Int8Matrix(matrix, jax.ShapeDtypeStruct((2048,), F32))
    parts = [Part(2048, dtype)]
    assert api._choose_implementation(x, matrix, parts, jnp.dtype(dtype)) == choice


def test_the_kernel_is_refused_elsewhere():
    if find_target().is_hopper:
        pytest.skip("is about other devices")
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper GPU, this is"):
        multiply(implementation="mosaic_gpu")


def test_implementations_have_the_common_names():
    assert set(api.IMPLEMENTATIONS) <= set(get_args(Implementation))


@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize("dtype", [BF16, jnp.int8])
@pytest.mark.parametrize(
    ("in_features", "widths", "activation"),
    [
        (256, [8], None),
        (1024, [256, 2048, 1024], None),
        (4864, [2048], None),
        (2048, [32000], None),
        (4096, [11008], "swiglu"),
    ],
)
def test_tilings_of_many_rows_fit(in_features, widths, activation, dtype, rows):
    is_paired = activation == "swiglu"
    tiling = choose_wide_tiling(
        rows, in_features, widths, weight_bytes=jnp.dtype(dtype).itemsize, is_paired=is_paired
    )
    assert all(width % tiling.features == 0 for width in widths)
    # A block starts with all stages, and gives every thread an output.
    assert 2 <= tiling.stages <= in_features // 64 // tiling.splits
    assert rows // tiling.splits * tiling.columns >= 128
    operands = SkinnyOperands(
        jax.ShapeDtypeStruct((rows, in_features), BF16),
        jax.ShapeDtypeStruct((sum(widths) * (1 + is_paired), in_features), dtype),
        Epilogue(None, activation),
    )
    scratch = WideScratch.make(operands, tiling, RowNorm("layer", 1e-5), is_interpreted=False)
    arrays = [each for each in jax.tree.leaves(scratch) if each is not scratch.barriers]
    used = sum(math.prod(each.shape) * jnp.dtype(each.dtype).itemsize for each in arrays)
    assert used + 1024 <= HOPPER.shared_memory
