"""Launches of the Triton kernels that describe packed rows; see `row_splits.documents`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.common import triton
from pallas_kernels.timestep_norm.row_splits.types import TILE, TimestepNormGpuOptions

MODULE = "pallas_kernels.timestep_norm.triton.document_kernels"
# Tokens and warps of a program.
BLOCK, WARPS = 512, 8
# Numbers that describe a block's documents.
NUMBERS = 6


def run_token_info(
    options: TimestepNormGpuOptions,
    segment_ids: Int32[Array, "B L"],
    initial_count: Int32[Array, " B"],
    prior_count: Int32[Array, ""],
) -> Int32[Array, "B tiles 4 128"]:
    """`TimestepNormDocuments.token_info`."""
    rows, length = segment_ids.shape
    kernels = triton.load_kernels(MODULE, interpret=options.interpret)
    num_blocks = -(-length // BLOCK)
    (blocks,) = triton.launch(
        kernels.timestep_norm_block_documents,
        [segment_ids, length],
        [jax.ShapeDtypeStruct((rows, num_blocks, NUMBERS), jnp.int32)],
        grid=(num_blocks, rows),
        constants={"BLOCK": BLOCK},
        num_warps=WARPS,
        interpret=options.interpret,
    )
    # The kernel reads no counts if all documents start from nothing.
    counts = [segment_ids] * 2 if options.starts_empty else [initial_count, prior_count]
    (token_info,) = triton.launch(
        kernels.timestep_norm_token_info,
        [segment_ids, blocks, *counts, length, options.geometry.tiles_per_split * TILE],
        [jax.ShapeDtypeStruct((rows, length // TILE, 4, TILE), jnp.int32)],
        grid=(num_blocks, rows),
        constants={
            "BLOCK": BLOCK,
            "BLOCKS": 1 << (num_blocks - 1).bit_length(),
            "STARTS_EMPTY": options.starts_empty,
        },
        num_warps=WARPS,
        interpret=options.interpret,
    )
    return token_info
