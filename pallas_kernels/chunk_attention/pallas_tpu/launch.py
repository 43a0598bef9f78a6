"""Launches of the TPU kernels: grids, blocks and index maps.

Arrays stay (B, L, H * width), so that nothing is transposed around the kernels: a head is a block
of columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.pallas_tpu.block_sizes import LANES
from pallas_kernels.chunk_attention.pallas_tpu.kernels import (
    AttentionTpuPlan,
    BackwardRefs,
    ForwardRefs,
    backward_kernel,
    forward_kernel,
)
from pallas_kernels.common.pallas_tpu import launch

_GRID_SEMANTICS = ("parallel", "parallel", "arbitrary", "arbitrary")


def _launch(plan: AttentionTpuPlan, kernel: Any, *, multiply_adds: int, **options: Any) -> Any:
    return launch(
        kernel,
        dimension_semantics=_GRID_SEMANTICS,
        vmem_limit=plan.blocks.vmem_limit,
        flops=2 * multiply_adds,
        # Unknown: it depends on the documents which blocks are fetched.
        bytes_accessed=0,
        interpret=plan.interpret,
        **options,
    )


def _first_key_blocks(
    start: Int32[Array, "B L"], plan: AttentionTpuPlan, queries: int, keys: int
) -> Int32[Array, "B blocks"]:
    """The first block of keys that every block of queries sees; past the last one for none."""
    own_key = plan.key_offset + jnp.arange(plan.length, dtype=jnp.int32)
    num_key_blocks = (plan.key_offset + plan.length) // keys
    key_block = jnp.where(start <= own_key, start // keys, num_key_blocks)
    return key_block.reshape(start.shape[0], -1, queries).min(axis=2)


def attend_forward(
    plan: AttentionTpuPlan,
    q: Float[Array, "B L H*Dk"],
    k: Float[Array, "B M H*Dk"],
    v: Float[Array, "B M H*Dv"],
    start: Int32[Array, "B L"],
) -> tuple[Float[Array, "B L H*Dv"], Float[Array, "B H 1 L"]]:
    """Outputs, and the logarithm of each query's softmax denominator; both 0 without keys."""
    queries, keys = plan.blocks.queries, plan.blocks.keys
    reach, num_rows = plan.reach(queries, keys), q.shape[0]

    def key_block(b, h, i, step, first):
        return b, jnp.minimum(first[b, i] + step, plan.diagonal_block(i)), h

    def query_block(b, h, i, step, first):
        del step, first
        return b, i, h

    widths = plan.key_width + plan.value_width
    column = pltpu.VMEM((queries, LANES), jnp.float32)
    results = _launch(
        plan,
        lambda **refs: forward_kernel(plan, reach, ForwardRefs(**refs)),
        name="chunk_attention_forward",
        multiply_adds=num_rows * q.shape[1] * reach * keys * plan.heads * widths,
        grid=(num_rows, plan.heads, plan.length // queries, reach),
        prefetched={"first": _first_key_blocks(start, plan, queries, keys)},
        inputs={
            "q": (q, pl.BlockSpec((None, queries, plan.key_width), query_block)),
            "k": (k, pl.BlockSpec((None, keys, plan.key_width), key_block)),
            "v": (v, pl.BlockSpec((None, keys, plan.value_width), key_block)),
            "start": (
                start[:, None],
                pl.BlockSpec((None, 1, queries), lambda b, h, i, step, first: (b, 0, i)),
            ),
        },
        outputs={
            "out": (
                jax.ShapeDtypeStruct((*q.shape[:2], plan.heads * plan.value_width), v.dtype),
                pl.BlockSpec((None, queries, plan.value_width), query_block),
            ),
            "lse": (
                jax.ShapeDtypeStruct((num_rows, plan.heads, 1, plan.length), jnp.float32),
                pl.BlockSpec((None, None, 1, queries), lambda b, h, i, step, first: (b, h, 0, i)),
            ),
        },
        scratch={
            "acc": pltpu.VMEM((queries, plan.value_width), jnp.float32),
            "m_i": column,
            "l_i": column,
            "start_column": pltpu.VMEM((queries, LANES), jnp.int32),
        },
    )
    return results["out"], results["lse"]


def attend_backward(
    plan: AttentionTpuPlan,
    q: Float[Array, "B L H*Dk"],
    k: Float[Array, "B M H*Dk"],
    v: Float[Array, "B M H*Dv"],
    start: Int32[Array, "B L"],
    lse: Float[Array, "B H 1 L"],
    delta: Float[Array, "B H 1 L"],
    do: Float[Array, "B L H*Dv"],
) -> tuple[Array, Array, Array]:
    """dq, dk, dv; `delta` is every query's sum of out * do.

    The grid goes through the blocks of keys. A block of keys is seen by the queries of its own
    tokens and by the reach - 1 blocks of queries after them.
    """
    size, num_rows = plan.blocks.backward, q.shape[0]
    reach = plan.reach(size, size)
    first = _first_key_blocks(start, plan, size, size)
    specs = _backward_specs(plan, size)
    operands = {"q": q, "do": do, "lse": lse, "delta": delta, "start": start[:, None]}
    results = _launch(
        plan,
        lambda **refs: backward_kernel(plan, reach, BackwardRefs(**refs)),
        name="chunk_attention_backward",
        multiply_adds=num_rows
        * k.shape[1]
        * reach
        * size
        * plan.heads
        * (3 * plan.key_width + 2 * plan.value_width),
        grid=(num_rows, plan.heads, k.shape[1] // size, reach),
        prefetched={"first": first, "last": _last_query_blocks(plan, first, k.shape[1] // size)},
        inputs={name: (a, specs[name]) for name, a in (operands | {"k": k, "v": v}).items()},
        outputs={
            "d" + name: (jax.ShapeDtypeStruct(x.shape, x.dtype), specs["d" + name])
            for name, x in (("q", q), ("k", k), ("v", v))
        },
        scratch={
            "dq_ring": pltpu.VMEM((reach, size, plan.key_width), jnp.float32),
            "dk_acc": pltpu.VMEM((size, plan.key_width), jnp.float32),
            "dv_acc": pltpu.VMEM((size, plan.value_width), jnp.float32),
        },
    )
    return results["dq"], results["dk"], results["dv"]


def _last_query_blocks(
    plan: AttentionTpuPlan, first: Int32[Array, "B blocks"], num_key_blocks: int
) -> Int32[Array, "B key_blocks"]:
    """The last block of queries that sees each block of keys, counted from the first key."""
    size = plan.blocks.backward
    offset_blocks, num_query_blocks = plan.key_offset // size, plan.length // size
    block = jnp.arange(num_key_blocks, dtype=jnp.int32)
    sees = first[:, None, :] <= block[:, None]
    diagonal = offset_blocks + block[:num_query_blocks]
    sees &= (diagonal - block[:, None] < plan.reach(size, size))[None]
    return jnp.where(sees, offset_blocks + block[:num_query_blocks], 0).max(axis=2)


def _backward_specs(plan: AttentionTpuPlan, size: int) -> dict[str, pl.BlockSpec]:
    offset_blocks = plan.key_offset // size
    num_key_blocks = offset_blocks + plan.length // size

    def query_index(b, j, step, last):
        index = jnp.minimum(j + step, last[b, j])
        return jnp.clip(index, offset_blocks, num_key_blocks - 1) - offset_blocks

    def query_block(b, h, j, step, first, last):
        del first
        return b, query_index(b, j, step, last), h

    def query_row(b, h, j, step, first, last):
        del first
        return b, h, 0, query_index(b, j, step, last)

    def start_row(b, h, j, step, first, last):
        del h, first
        return b, 0, query_index(b, j, step, last)

    def key_block(b, h, j, step, first, last):
        del step, first, last
        return b, j, h

    def own_query_block(b, h, j, step, first, last):
        del step, first, last
        return b, jnp.maximum(j - offset_blocks, 0), h

    key_spec = pl.BlockSpec((None, size, plan.key_width), key_block)
    value_spec = pl.BlockSpec((None, size, plan.value_width), key_block)
    row_spec = pl.BlockSpec((None, None, 1, size), query_row)
    return {
        "q": pl.BlockSpec((None, size, plan.key_width), query_block),
        "do": pl.BlockSpec((None, size, plan.value_width), query_block),
        "lse": row_spec,
        "delta": row_spec,
        "start": pl.BlockSpec((None, 1, size), start_row),
        "k": key_spec,
        "v": value_spec,
        "dq": pl.BlockSpec((None, size, plan.key_width), own_query_block),
        "dk": key_spec,
        "dv": value_spec,
    }
