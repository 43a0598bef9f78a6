"""Layouts in registers of the arrays of chunk decoding, for a block of one warpgroup."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chunk_decode.block_sizes import KEY_MULTIPLE, SCORE_SLOTS, THREADS


def key_layout(columns: int) -> Any:
    """Keys of SCORE_SLOTS slots and some columns in registers.

    A warp has 16 slots. Four threads share a slot, with a quarter of the columns each: a load of 16
    bytes if the columns have KEY_BYTES.
    """
    return plgpu.Layout.TILED(
        plgpu.Tiling(((SCORE_SLOTS, columns), (16, columns), (8, columns), (columns // 4,))),
        warp_dims=(-7,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


# The same for any number of columns.
SCORE_LAYOUT = key_layout(32).reduce(1)


def value_layout(columns: int, itemsize: int = 2) -> Any:
    """One row of values in registers: adjacent columns of a thread have up to 16 bytes."""
    sizes = (16 // itemsize, 8, 4, 2, 1)
    vec_size = next(size for size in sizes if columns % (size * THREADS) == 0)
    return plgpu.Layout.WG_STRIDED((columns,), vec_size=vec_size)


def token_layout(columns: int) -> Any:
    """One query or key in registers: a multiple of KEY_MULTIPLE columns, float32 or bfloat16."""
    if columns % THREADS == 0:
        return value_layout(columns, itemsize=4)
    # Every warp has all columns.
    return plgpu.Layout.TILED(
        plgpu.Tiling(((KEY_MULTIPLE,), (2,))),
        warp_dims=(plgpu.Replicated(THREADS // 32),),
        lane_dims=(-2,),
        vector_dim=-1,
    )
