"""Products of tiles in registers by the tensor cores' `mma.sync`, 16 x 8 x 16.

Its operands hold two adjacent numbers of a row in every thread. A sum over columns may take them in
any order: a thread loads 8 adjacent numbers, 16 bytes of bfloat16, and gives 4 of them to each of
two instructions. Both operands have the same order.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels.skinny_matmul.block_sizes import WARP_WIDTH, WARPS

# Adjacent numbers of a thread: four threads have a warp's columns.
VECTOR = WARP_WIDTH // 4
# Rows of the first operand, and of the second one.
M, N = 16, 8
# (WARPS * M, columns): the sums of every warp, one warp after the other.
SUMS = plgpu.Layout.MMA_ACC(jnp.bfloat16)


def tile_layout(rows: int) -> Any:
    """The layout of (rows, WARPS, WARP_WIDTH); 2, 4, or a multiple of 8 rows.

    A warp has its own columns of all rows. Fewer than 8 rows repeat in the operand's 8.
    """
    rows = min(rows, N)
    repeats = () if rows == N else (plgpu.Replicated(N // rows),)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((rows, WARPS, WARP_WIDTH), (rows, 1, WARP_WIDTH), (VECTOR,))),
        warp_dims=(-6,),
        lane_dims=(*repeats, -4, -2),
        vector_dim=-1,
    )


def outputs_layout(rows: int, features: int) -> Any:
    """The layout of (rows, features), a number in every thread; a power of two of rows."""
    of_warp = min(rows, 32 // features)
    warps = min(WARPS, rows // of_warp)
    of_lanes = 32 // features // of_warp
    repeats = () if of_lanes == 1 else (plgpu.Replicated(of_lanes),)
    if warps == 1:
        return plgpu.Layout.TILED(
            plgpu.Tiling(((of_warp, features), (1,))),
            warp_dims=(plgpu.Replicated(WARPS),),
            lane_dims=(*repeats, -3, -2),
            vector_dim=-1,
        )
    return plgpu.Layout.TILED(
        plgpu.Tiling(((warps * of_warp, features), (of_warp, features), (1,))),
        warp_dims=(-5,) if warps == WARPS else (-5, plgpu.Replicated(WARPS // warps)),
        lane_dims=(*repeats, -3, -2),
        vector_dim=-1,
    )


def vectors_layout(rows: int, columns: int) -> Any:
    """The layout of (rows, columns), up to 4 adjacent numbers in every thread.

    Powers of two of both, 8 to 64 columns, at least a number for every thread.
    """
    size = min(4, rows * columns // (32 * WARPS))
    of_warp = 32 * size // columns
    if of_warp == 1:
        return plgpu.Layout.TILED(
            plgpu.Tiling(((WARPS, columns), (size,))),
            warp_dims=(-3,),
            lane_dims=(-2,),
            vector_dim=-1,
        )
    return plgpu.Layout.TILED(
        plgpu.Tiling(((WARPS * of_warp, columns), (of_warp, columns), (size,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def integers_layout(features: int) -> Any:
    """The layout of 8-bit weights (features, 64), 8 adjacent ones in every thread.

    Eight threads have a row: as bfloat16 it is 128 bytes, a row of swizzled shared memory.
    """
    warps = WARPS if features % (4 * WARPS) == 0 else 2
    return plgpu.Layout.TILED(
        plgpu.Tiling(((4 * warps, 64), (4, 64), (8,))),
        warp_dims=(-5,) if warps == WARPS else (-5, plgpu.Replicated(WARPS // warps)),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def multiply_add(sums: Any, x: Any, weights: Any, *, is_interpreted: bool) -> Any:
    """sums + x weightsᵀ, each warp over its own columns, in float32.

    Args:
      sums: (WARPS * M, N); the rows beyond those of x are not used.
      x: (2, 4, 8 or 16, WARPS, WARP_WIDTH), bfloat16 or float32; float32 numbers are multiplied as
        two of bfloat16.
      weights: (N, WARPS, WARP_WIDTH), N a multiple of 8, bfloat16.
      is_interpreted: whether the kernel's interpreter runs this, which knows arrays only.
    """
    if is_interpreted:
        wide = x.astype(jnp.float32), weights.astype(jnp.float32)
        product = jnp.einsum("bwk,nwk->wbn", *wide, precision=jax.lax.Precision.HIGHEST)
        product = jnp.pad(product, ((0, 0), (0, M - len(x)), (0, 0)))
        return sums + product.reshape(sums.shape)

    @plgpu.inline_mgpu(
        arg_types=(SUMS, tile_layout(len(x)), tile_layout(N)),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout=SUMS),
    )
    def in_registers(_: Any, sums: Any, x: Any, weights: Any) -> Any:
        bf16 = weights.mlir_dtype
        operands = [x]
        if x.mlir_dtype != bf16:
            high = x.astype(bf16)
            operands = [high, (x - high.astype(x.mlir_dtype)).astype(bf16)]
        for operand in operands:
            for first in range(0, VECTOR, 4):
                sums = mgpu.mma(sums, _as_first(operand, first), _as_second(weights, first))
        return sums

    return in_registers(sums, x, weights)  # pyright: ignore[reportCallIssue]


def _as_first(x: Any, first: int) -> Any:
    """Numbers `first` to `first` + 3 of every thread as the first operand (WARPS * M, 16)."""
    rows = list(x.registers.flatten())
    pairs = [[mgpu_utils.vector_slice(row, slice(i, i + 2)) for row in rows]
             for i in (first, first + 2)]  # fmt: skip
    if len(rows) == 1:
        zero = mgpu.FragmentedArray.splat(
            mgpu.c(0, x.mlir_dtype), x.shape, x.layout, is_signed=x.is_signed
        )
        absent = mgpu_utils.vector_slice(zero.registers.flat[0], slice(0, 2))
        pairs = [[row, absent] for [row] in pairs]
    return _fragment(pairs, mgpu.MMALayouts(x.mlir_dtype).lhs, (WARPS * M, 16))


def _as_second(weights: Any, first: int) -> Any:
    """Numbers `first` to `first` + 3 of every thread as the second operand (16, N)."""
    rows = weights.registers.flatten()
    pairs = [[mgpu_utils.vector_slice(row, slice(i, i + 2)) for i in (first, first + 2)]
             for row in rows]  # fmt: skip
    return _fragment(pairs, mgpu.MMALayouts(weights.mlir_dtype).rhs, (16, weights.shape[0]))


def _fragment(registers: list[list[Any]], layout: Any, shape: tuple[int, int]) -> Any:
    flat = np.array([each for group in registers for each in group], dtype=object)
    return mgpu.FragmentedArray(
        _registers=flat.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )


def swap_pairs(y: Any, layout: Any, *, is_interpreted: bool) -> Any:
    """y (rows, features) with columns 2i and 2i + 1 exchanged; a layout of adjacent numbers."""
    if is_interpreted:
        return y.reshape(len(y), -1, 2)[..., ::-1].reshape(y.shape)

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(y.shape, y.dtype, layout=layout)
    )
    def in_registers(_: Any, y: Any) -> Any:
        exchanged = [_exchange(each) for each in y.registers.flat]
        registers = np.array(exchanged, dtype=object).reshape(y.registers.shape)
        return mgpu.FragmentedArray(_registers=registers, _layout=y.layout, _is_signed=y.is_signed)

    return in_registers(y)  # pyright: ignore[reportCallIssue]


def _exchange(numbers: Any) -> Any:
    """Exchanges the two numbers of every pair, which two threads may share."""
    [size] = ir.VectorType(numbers.type).shape
    if size == 1:
        return mgpu_utils.shfl_bfly(numbers, 1)
    return vector.shuffle(numbers, numbers, [i ^ 1 for i in range(size)])
