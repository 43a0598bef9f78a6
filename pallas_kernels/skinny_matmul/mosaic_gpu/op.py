"""Products of a few rows on Hopper: checks, the tiling and the launch."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.common.mosaic_gpu import interpret_params
from pallas_kernels.common.target import check_hopper
from pallas_kernels.skinny_matmul.block_sizes import (
    MAX_MULTIPLY_ADD_ROWS,
    MAX_ROWS,
    MAX_WEIGHT_BYTES,
    MMA_ROWS,
    WARPS,
    WIDTH,
    SkinnyTiling,
    TensorCoreTiling,
    WideTiling,
    choose_tensor_core_tiling,
    choose_tiling,
    choose_wide_tiling,
)
from pallas_kernels.skinny_matmul.mosaic_gpu.launch import launch_skinny_matmul
from pallas_kernels.skinny_matmul.mosaic_gpu.operands import SkinnyOperands
from pallas_kernels.skinny_matmul.types import (
    Epilogue,
    Matrix,
    Part,
    RowNorm,
    starts_of,
    sum_weights,
    values_of,
)
from pallas_kernels.skinny_matmul.xla import normalize


def find_obstacle(x: Array, matrix: Matrix, parts: Sequence[Part], dtype: jnp.dtype) -> str | None:
    """The reason why the kernel cannot take these operands; None if it can."""
    values = values_of(matrix)
    if dtype != jnp.bfloat16 or values.dtype not in (jnp.bfloat16, jnp.int8):
        return f"takes products in bfloat16, these are of {dtype} and {values.dtype}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 or float32 rows, x is {x.dtype}"
    if not 1 <= x.shape[0] <= MAX_ROWS:
        return f"takes 1 to {MAX_ROWS} rows, x has {x.shape[0]}"
    if x.shape[1] % WIDTH or any(part.width % (2 * WARPS) for part in parts):
        return (
            f"needs a multiple of {WIDTH} input features and parts of a multiple of {2 * WARPS}; "
            f"there are {x.shape[1]} and parts of {[part.width for part in parts]}"
        )
    if _choose_tiling(x, matrix, parts) is None:
        halves = values.shape[0] // starts_of(parts)[-1]
        return (
            f"keeps the weights of 8 output features in shared memory, {MAX_WEIGHT_BYTES} bytes at "
            f"most; here they take {8 * halves * x.shape[1] * values.dtype.itemsize}"
        )
    return None


def skinny_matmul(
    x: Float[Array, "B K"],
    matrix: Matrix,
    norm: RowNorm | None,
    epilogue: Epilogue,
    parts: Sequence[Part],
    dtype: jnp.dtype,
    weight_sums: Float32[Array, " N"] | None = None,
    *,
    tiling: SkinnyTiling | TensorCoreTiling | WideTiling | None = None,
) -> tuple[Array, ...]:
    """One kernel; another one rounds more than MMA_ROWS float32 rows, after their norm.

    Arguments as in `api.skinny_matmul`.

    Raises:
      ValueError: a shape or dtype that the kernel does not have, or a device that is no Hopper GPU.
    """
    check_hopper("mosaic_gpu")
    obstacle = find_obstacle(x, matrix, parts, dtype)
    if obstacle is not None:
        raise ValueError(f"skinny_matmul: mosaic_gpu {obstacle}; use implementation 'xla' or None")
    if x.shape[0] > MMA_ROWS and x.dtype == jnp.float32:
        # Multiplied as two of bfloat16 they took 8.7 us with LayerNorm and silu, 64 rows, 1,024 x
        # 2,560 on an H200 (README.md).
        x, norm = (x if norm is None else normalize(x, norm)).astype(dtype), None
    tiling = tiling or _choose_tiling(x, matrix, parts)
    assert tiling is not None  # An obstacle above.
    is_layer = norm is not None and norm.kind == "layer"
    if not is_layer:
        weight_sums = None
    elif weight_sums is None and isinstance(tiling, WideTiling):
        # The kernel of many rows has no weights in registers.
        weight_sums = sum_weights(matrix)
    operands = SkinnyOperands(x, matrix, epilogue._replace(activation=None), weight_sums)
    num_rows = x.shape[0]
    if not isinstance(tiling, SkinnyTiling):
        operands = _pad_rows(operands, _padded_rows(num_rows) - num_rows)
    results = launch_skinny_matmul(
        operands, norm, epilogue.activation, tuple(parts), tiling, interpret_params()
    )
    return tuple(result[:num_rows] for result in results)


def _choose_tiling(
    x: Array, matrix: Matrix, parts: Sequence[Part]
) -> SkinnyTiling | TensorCoreTiling | WideTiling | None:
    values = values_of(matrix)
    out_features = starts_of(parts)[-1]
    halves = values.shape[0] // out_features
    if x.shape[0] <= MAX_MULTIPLY_ADD_ROWS:
        return choose_tiling(out_features, x.shape[1], is_paired=halves == 2)
    choose = choose_wide_tiling
    if x.shape[0] <= MMA_ROWS:
        choose = partial(choose_tensor_core_tiling, row_bytes=x.dtype.itemsize)
    return choose(
        _padded_rows(x.shape[0]),
        x.shape[1],
        [part.width for part in parts if not part.is_swapped],
        weight_bytes=values.dtype.itemsize,
        is_paired=halves == 2,
    )


def _padded_rows(num_rows: int) -> int:
    """The next power of two, at least 2."""
    return max(2, 1 << (num_rows - 1).bit_length())


def _pad_rows(operands: SkinnyOperands, count: int) -> SkinnyOperands:
    """The operands with rows of zeros after x and what is added."""
    if count == 0:
        return operands
    added = [jnp.pad(each, ((0, count), (0, 0))) for each in operands.epilogue.added]
    return operands._replace(
        x=jnp.pad(operands.x, ((0, count), (0, 0))),
        epilogue=operands.epilogue._replace(added=added),
    )
