"""Products of a few rows on Hopper: checks, the tiling and the launch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.common.mosaic_gpu import interpret_params, launch
from pallas_kernels.common.target import check_hopper
from pallas_kernels.skinny_matmul.block_sizes import (
    MAX_ROWS,
    WARPS,
    WIDTH,
    SkinnyTiling,
    choose_tiling,
)
from pallas_kernels.skinny_matmul.mosaic_gpu.kernels import SkinnyOperands, skinny_kernel
from pallas_kernels.skinny_matmul.types import (
    Activation,
    Epilogue,
    Int8Matrix,
    Matrix,
    Part,
    RowNorm,
    starts_of,
)


def find_obstacle(x: Array, matrix: Matrix, parts: Sequence[Part], dtype: jnp.dtype) -> str | None:
    """The reason why the kernel cannot take these operands; None if it can."""
    values = matrix.values if isinstance(matrix, Int8Matrix) else matrix
    if dtype != jnp.bfloat16 or values.dtype not in (jnp.bfloat16, jnp.int8):
        return f"takes products in bfloat16, these are of {dtype} and {values.dtype}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 or float32 rows, x is {x.dtype}"
    if not 1 <= x.shape[0] <= MAX_ROWS:
        return f"keeps the sums of 1 to {MAX_ROWS} rows in registers, x has {x.shape[0]}"
    if x.shape[1] % WIDTH or any(part.width % (2 * WARPS) for part in parts):
        return (
            f"needs a multiple of {WIDTH} input features and parts of a multiple of {2 * WARPS}; "
            f"there are {x.shape[1]} and parts of {[part.width for part in parts]}"
        )
    return None


def skinny_matmul(
    x: Float[Array, "B K"],
    matrix: Matrix,
    norm: RowNorm | None,
    epilogue: Epilogue,
    parts: Sequence[Part],
    dtype: jnp.dtype,
    *,
    tiling: SkinnyTiling | None = None,
) -> tuple[Array, ...]:
    """One kernel. Arguments as in `api.skinny_matmul`.

    Raises:
      ValueError: a shape or dtype that the kernel does not have, or a device that is no Hopper GPU.
    """
    check_hopper("mosaic_gpu")
    obstacle = find_obstacle(x, matrix, parts, dtype)
    if obstacle is not None:
        raise ValueError(f"skinny_matmul: mosaic_gpu {obstacle}; use implementation 'xla' or None")
    out_features = starts_of(parts)[-1]
    is_paired = epilogue.activation == "swiglu"
    tiling = tiling or choose_tiling(out_features, x.shape[1], is_paired=is_paired)
    return _launch(
        SkinnyOperands(x, matrix, epilogue._replace(activation=None)),
        norm,
        epilogue.activation,
        tuple(parts),
        tiling,
        interpret_params(),
    )


# Traced and lowered once for all layers: a kernel of 8 rows takes a second or more.
@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _launch(
    operands: SkinnyOperands,
    norm: RowNorm | None,
    activation: Activation | None,
    parts: tuple[Part, ...],
    tiling: SkinnyTiling,
    interpret: Any,
) -> tuple[Array, ...]:
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
