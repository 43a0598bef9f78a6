"""The TPU compiler accepts chunk attention's kernels; no TPU is needed."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chunk_attention import KeyValueCache, chunk_attention
from tests.topologies import compile_for, tpu_device

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}


def compile_gradient(
    chip, *, length=4096, chunk=2048, widths=(256, 2048), dtype=jnp.bfloat16, rows=(), **options
):
    """The compiled program; `rows` names arguments among positions, segment_ids and cache."""
    shape = jax.ShapeDtypeStruct
    q, v = (shape((1, length, 2, width), dtype) for width in widths)
    given = {name: shape((1, length), jnp.int32) for name in ("positions", "segment_ids")}
    given["cache"] = KeyValueCache(
        *(shape((1, x.shape[2], chunk, x.shape[3]), dtype) for x in (q, v))
    )
    given = {name: given[name] for name in rows}

    def run(q, k, v, given, cotangent):
        def attend(*qkv):
            return chunk_attention(*qkv, chunk_size=chunk, **given, **options).out

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(cotangent)

    return compile_for(tpu_device(TOPOLOGIES[chip]), run, q, q, v, given, v).as_text() or ""


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles(chip):
    # Through the default choice where that is pallas_tpu.
    options = {"implementation": "pallas_tpu"} if chip == "v4" else {}
    text = compile_gradient(chip, rows=("positions", "segment_ids"), **options)
    kernels = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert any("chunk_attention_forward" in line for line in kernels)
    assert any("chunk_attention_backward" in line for line in kernels)


@pytest.mark.slow
def test_float32_narrow_heads_and_cache_compile():
    text = compile_gradient(
        "v5e", length=700, chunk=1000, widths=(64, 192), dtype=jnp.float32,
        rows=("positions", "cache"),
    )  # fmt: skip
    assert "chunk_attention_backward" in text


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit into the memory of TPU v4"):
        compile_gradient("v4", chunk=2**16, length=2**16, implementation="pallas_tpu")
