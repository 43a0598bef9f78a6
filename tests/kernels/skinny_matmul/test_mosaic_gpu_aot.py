"""The CUDA compiler accepts products of a few rows for an H200: nothing spills."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.skinny_matmul import Epilogue, Int8Matrix, Part, RowNorm
from pallas_kernels.skinny_matmul.mosaic_gpu import op as mosaic_gpu
from tests.topologies import compile_for, h200_device, ptxas_usage

BF16, F32 = jnp.bfloat16, jnp.float32
Shape = jax.ShapeDtypeStruct


# Layers of mega200M, mega1.3B and, with SwiGLU, of the paper's 7B.
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "norm", "activation", "dtype"),
    [
        (2, 1024, 2048, None, "silu", BF16),
        (4, 1024, 3328, "rms", None, BF16),
        (4, 4864, 2048, None, None, BF16),
        (2, 2048, 4864, "layer", "silu", BF16),
        (4, 4096, 16384, "layer", "swiglu", BF16),
        (4, 1024, 2560, "layer", "silu", jnp.int8),
        (8, 1024, 3328, "rms", None, BF16),
        (8, 4864, 2048, None, None, BF16),
        (8, 1024, 2560, "layer", "silu", jnp.int8),
        (16, 2048, 4864, "layer", "silu", BF16),
        (16, 4096, 16384, "layer", "swiglu", BF16),
        (64, 1024, 3328, "rms", None, BF16),
        (32, 4864, 2048, None, None, jnp.int8),
        (64, 2048, 4864, "layer", "silu", BF16),
        (64, 1024, 32000, None, None, BF16),
        (64, 4096, 16384, "layer", "swiglu", jnp.int8),
    ],
)
@pytest.mark.slow
def test_kernel_fits_into_registers(rows, in_features, out_features, norm, activation, dtype):
    width = out_features // 2 if activation == "swiglu" else out_features

    def multiply(x, values, vector, added):
        matrix = Int8Matrix(values, vector) if dtype == jnp.int8 else values
        return mosaic_gpu.skinny_matmul(
            x,
            matrix,
            None if norm is None else RowNorm(norm, 1e-5),
            Epilogue(vector, activation, None, [added]),
            [Part(width, BF16)],
            jnp.dtype(BF16),
            # The two kernels that can add up weights do it where they need most registers.
            None if activation == "swiglu" and rows <= 16 else vector,
        )

    compiled = compile_for(
        h200_device(),
        multiply,
        Shape((rows, in_features), BF16 if norm is None else F32),
        Shape((out_features, in_features), dtype),
        Shape((out_features,), F32),
        Shape((rows, width), F32),
    )
    (usage,) = ptxas_usage(compiled)
    print(f"{usage.name}: {usage.registers} registers for {rows} rows of {in_features}")
    kernels = "skinny_matmul", "skinny_matmul_tensor_cores", "skinny_matmul_wide"
    assert usage.name == kernels[(rows > 4) + (rows > 16)]
    assert usage.spill_bytes == 0
