"""Launches of the kernels of chunk decoding: grids, results and shared memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.chunk_decode.block_sizes import DecodeTiling
from pallas_kernels.chunk_decode.mosaic_gpu.kernels import (
    CombineOperands,
    DecodeMemory,
    DecodeOperands,
    SplitResults,
    combine_kernel,
    decode_kernel,
)
from pallas_kernels.common.mosaic_gpu import launch


# Layers share one compiled kernel, because `jit` traces it once.
@partial(jax.jit, static_argnums=1, static_argnames="interpret")
def launch_splits(
    operands: DecodeOperands, tiling: DecodeTiling, *, interpret: Any
) -> SplitResults:
    """Attends over every split, and writes the tokens' keys and values into the cache.

    Args:
      operands: arrays; the cache has references from `jax.new_ref`.
      tiling: how slots and value columns are divided into blocks.
      interpret: from `interpret_params`.

    Returns:
      Results of the splits; undefined for splits without a filled slot.
    """
    rows, heads, width = operands.v.shape
    _, _, num_slots, key_width = operands.cache.key.shape
    splits = tiling.count_splits(num_slots)
    by_slot = plgpu.SMEM((tiling.slots_per_block,), jnp.float32)
    numbers = jax.ShapeDtypeStruct((rows, heads, splits), jnp.float32)
    return launch(
        partial(decode_kernel, tiling=tiling, is_interpreted=interpret is not None),
        operands,
        SplitResults(jax.ShapeDtypeStruct((*numbers.shape, width), jnp.float32), numbers, numbers),
        name="chunk_decode_splits",
        # Blocks that share keys are neighbours.
        grid={"b": rows, "h": heads, "s": splits, "d": width // tiling.value_tile},
        scratch=DecodeMemory(
            plgpu.SMEM((key_width,), jnp.float32),
            by_slot,
            by_slot if operands.cache.is_quantized else None,
        ),
        approx_math=True,
        interpret=interpret,
    )


@partial(jax.jit, static_argnums=(1, 2, 3), static_argnames="interpret")
def launch_combination(
    operands: CombineOperands,
    num_slots: int,
    dtype: Any,
    tiling: DecodeTiling,
    *,
    interpret: Any,
) -> Float[Array, "B H Dv"]:
    """Combines the splits' results into the outputs.

    Args:
      operands: arrays, the splits from `launch_splits`.
      num_slots: slots C of a chunk.
      dtype: of the result.
      tiling: as in `launch_splits`.
      interpret: from `interpret_params`.
    """
    rows, heads, _, width = operands.splits.acc.shape

    def kernel(operands: CombineOperands, out: Any, scratch: Any) -> None:
        del scratch
        combine_kernel(operands, out, num_slots=num_slots, tiling=tiling)

    return launch(
        kernel,
        operands,
        jax.ShapeDtypeStruct((rows, heads, width), dtype),
        name="chunk_decode_combine",
        grid={"b": rows, "h": heads, "d": width // tiling.combine_tile},
        approx_math=True,
        interpret=interpret,
    )
