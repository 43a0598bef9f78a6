"""Products of a few rows on Hopper: checks, the tiling and the launch."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.mosaic_gpu import interpret_params
from pallas_kernels.common.target import check_hopper
from pallas_kernels.skinny_matmul.block_sizes import (
    MAX_ROWS,
    WARPS,
    WIDTH,
    SkinnyTiling,
    choose_tiling,
)
from pallas_kernels.skinny_matmul.mosaic_gpu.kernels import SkinnyOperands
from pallas_kernels.skinny_matmul.mosaic_gpu.launch import launch_skinny_matmul
from pallas_kernels.skinny_matmul.types import (
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
    return launch_skinny_matmul(
        SkinnyOperands(x, matrix, epilogue._replace(activation=None)),
        norm,
        epilogue.activation,
        tuple(parts),
        tiling,
        interpret_params(),
    )
