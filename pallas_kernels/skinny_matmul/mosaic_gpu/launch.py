"""The launch of products of a few rows: grid, results and shared memory."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.common.mosaic_gpu import launch
from pallas_kernels.skinny_matmul.block_sizes import (
    SkinnyTiling,
    TensorCoreTiling,
)
from pallas_kernels.skinny_matmul.mosaic_gpu.fragments import WARP_WIDTH
from pallas_kernels.skinny_matmul.mosaic_gpu.kernels import skinny_kernel
from pallas_kernels.skinny_matmul.mosaic_gpu.operands import SkinnyOperands
from pallas_kernels.skinny_matmul.mosaic_gpu.tensor_cores import (
    TensorCoreScratch,
    tensor_core_kernel,
)
from pallas_kernels.skinny_matmul.types import (
    Activation,
    Int8Matrix,
    Part,
    RowNorm,
    starts_of,
)


# Traced and lowered once for all layers: a kernel of 8 rows takes a second or more.
@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def launch_skinny_matmul(
    operands: SkinnyOperands,
    norm: RowNorm | None,
    activation: Activation | None,
    parts: tuple[Part, ...],
    tiling: SkinnyTiling,
    interpret: Any,
) -> tuple[Array, ...]:
    """Runs the kernel and returns the parts.

    Args:
      operands: arrays; the epilogue's activation is None.
      norm: of the rows.
      activation: of the epilogue.
      parts: of the output features.
      tiling: how the matrix is divided.
      interpret: from `interpret_params`.
    """
    x, out_features = operands.x, starts_of(parts)[-1]

    def kernel(operands: SkinnyOperands, results: Sequence[Any], outputs_smem: Any) -> None:
        vectors = operands.epilogue._replace(activation=activation)
        skinny_kernel(
            operands._replace(epilogue=vectors),
            results,
            outputs_smem,
            tiling=tiling,
            norm=norm,
            parts=parts,
        )

    return tuple(
        launch(
            kernel,
            operands,
            [jax.ShapeDtypeStruct((x.shape[0], part.width), part.dtype) for part in parts],
            name="skinny_matmul",
            grid={"n": out_features // tiling.rows},
            scratch=plgpu.SMEM((x.shape[0], tiling.rows), jnp.float32),
            interpret=interpret,
        )
    )


# As above.
@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def launch_on_tensor_cores(
    operands: SkinnyOperands,
    norm: RowNorm | None,
    activation: Activation | None,
    parts: tuple[Part, ...],
    tiling: TensorCoreTiling,
    interpret: Any,
) -> tuple[Array, ...]:
    """The kernel on tensor cores, for 2, 4, 8 or 16 rows; see `launch_skinny_matmul`."""
    x, matrix = operands.x, operands.matrix

    def kernel(operands: SkinnyOperands, results: Sequence[Any], scratch: Any) -> None:
        vectors = operands.epilogue._replace(activation=activation)
        tensor_core_kernel(
            operands._replace(epilogue=vectors),
            results,
            scratch,
            tiling=tiling,
            norm=norm,
            parts=parts,
            is_interpreted=interpret is not None,
        )

    def by_warp(a: Array) -> Array:
        return a.reshape(a.shape[0], -1, WARP_WIDTH)

    if isinstance(matrix, Int8Matrix):
        matrix = Int8Matrix(by_warp(matrix.values), matrix.scale)
    else:
        matrix = by_warp(matrix)
    operands = operands._replace(x=by_warp(x), matrix=matrix)
    halves = 2 if activation == "swiglu" else 1
    return tuple(
        launch(
            kernel,
            operands,
            [jax.ShapeDtypeStruct((x.shape[0], part.width), part.dtype) for part in parts],
            name="skinny_matmul_tensor_cores",
            grid={"n": starts_of(parts)[-1] // tiling.features},
            scratch=TensorCoreScratch.make(operands, halves, tiling, norm),
            interpret=interpret,
        )
    )
