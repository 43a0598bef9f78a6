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
    CLUSTER_AXIS,
    WARP_WIDTH,
    SkinnyTiling,
    TensorCoreTiling,
    WideTiling,
)
from pallas_kernels.skinny_matmul.mosaic_gpu.kernels import skinny_kernel
from pallas_kernels.skinny_matmul.mosaic_gpu.operands import SkinnyOperands
from pallas_kernels.skinny_matmul.mosaic_gpu.tensor_cores import (
    TensorCoreScratch,
    tensor_core_kernel,
)
from pallas_kernels.skinny_matmul.mosaic_gpu.wide import wide_kernel
from pallas_kernels.skinny_matmul.mosaic_gpu.wide_products import WideScratch
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
    tiling: SkinnyTiling | TensorCoreTiling | WideTiling,
    interpret: Any,
) -> tuple[Array, ...]:
    """Runs the kernel of the tiling and returns the parts.

    Args:
      operands: arrays; the epilogue's activation is None. Tensor cores take 2, 4, 8 or 16 rows, or
        32 or 64 with `WideTiling`.
      norm: of the rows.
      activation: of the epilogue.
      parts: of the output features.
      tiling: how the matrix is divided.
      interpret: from `interpret_params`.
    """
    num_rows, out_features = operands.x.shape[0], starts_of(parts)[-1]
    is_interpreted, cluster = interpret is not None, None

    def with_activation(operands: SkinnyOperands) -> SkinnyOperands:
        return operands._replace(epilogue=operands.epilogue._replace(activation=activation))

    if isinstance(tiling, TensorCoreTiling):
        name, features = "skinny_matmul_tensor_cores", tiling.features
        operands = _by_warp(operands)
        scratch = TensorCoreScratch.make(with_activation(operands), tiling, norm)
        run = partial(tensor_core_kernel, tiling=tiling, is_interpreted=is_interpreted)
    elif isinstance(tiling, WideTiling):
        name, features = "skinny_matmul_wide", tiling.features
        scratch = WideScratch.make(
            with_activation(operands), tiling, norm, is_interpreted=is_interpreted
        )
        run = partial(wide_kernel, tiling=tiling, is_interpreted=is_interpreted)
        if tiling.splits > 1 and not is_interpreted:
            cluster = {CLUSTER_AXIS: tiling.splits}
    else:
        name, features = "skinny_matmul", tiling.rows
        scratch = plgpu.SMEM((num_rows, tiling.rows), jnp.float32)
        run = partial(skinny_kernel, tiling=tiling)

    def kernel(operands: SkinnyOperands, results: Sequence[Any], scratch: Any) -> None:
        run(with_activation(operands), results, scratch, norm=norm, parts=parts)

    return tuple(
        launch(
            kernel,
            operands,
            [jax.ShapeDtypeStruct((num_rows, part.width), part.dtype) for part in parts],
            name=name,
            grid={"n": out_features // features},
            cluster=cluster,
            scratch=scratch,
            interpret=interpret,
        )
    )


def _by_warp(operands: SkinnyOperands) -> SkinnyOperands:
    """Columns as (K / 32, 32)."""

    def split(a: Array) -> Array:
        return a.reshape(a.shape[0], -1, WARP_WIDTH)

    matrix = operands.matrix
    if isinstance(matrix, Int8Matrix):
        matrix = Int8Matrix(split(matrix.values), matrix.scale)
    else:
        matrix = split(matrix)
    return operands._replace(x=split(operands.x), matrix=matrix)
