"""The CUDA compiler accepts chunk attention for an H200 without spilling; no GPU is needed."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chunk_attention import chunk_attention
from tests.topologies import compile_for, h200_device, ptxas_usage


@pytest.mark.slow
def test_compiles_for_an_h200_without_spilling():
    shape = jax.ShapeDtypeStruct
    q = shape((1, 16_384, 4, 256), jnp.bfloat16)
    v = shape((1, 16_384, 4, 2048), jnp.bfloat16)
    ids = shape((1, 16_384), jnp.int32)

    def both_passes(q, k, v, do, positions, segment_ids):
        def attend(q, k, v):
            return chunk_attention(
                q,
                k,
                v,
                chunk_size=4096,
                positions=positions,
                segment_ids=segment_ids,
                implementation="mosaic_gpu",
            ).out

        # Recomputation drops whatever seems to have no result.
        out, pull_back = jax.vjp(jax.checkpoint(attend), q, k, v)
        return out, pull_back(do)

    compiled = compile_for(h200_device(), both_passes, q, q, v, v, ids, ids)
    usage = ptxas_usage(compiled)
    for kernel in usage:
        print(f"{kernel.name}: {kernel.registers} registers, {kernel.spill_bytes} B spilled")
    assert {kernel.name.removeprefix("chunk_attention_") for kernel in usage} == {
        "weights",
        "repair",
        "band_product",
        "band_transpose_product",
        "score_gradient",
    }
    assert not any(kernel.spill_bytes for kernel in usage)
