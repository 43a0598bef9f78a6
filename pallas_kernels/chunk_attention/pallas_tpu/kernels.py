"""The two kernels of chunk attention on TPU: attention of queries to intervals of keys.

Query t sees the keys start[t] .. left + t. Arrays stay (B, L, H·width), so that nothing is
transposed around the kernels: a head is a block of columns. `first` and `reach` say which blocks
of keys and queries see each other at all; the others are neither fetched nor computed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.pallas_tpu.block_sizes import TpuBlocks
from pallas_kernels.chunk_attention.types import matmul_precision

_LANES = 128
# Finite: the difference of two infinities is no number.
_MASKED = -1e38


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call.

    Attributes:
      heads: of queries, keys and values.
      key_width: of a head of q and k, a multiple of 128.
      value_width: of a head of v, a multiple of 128.
      chunk_size: no query reaches a key so many tokens before it.
      aligned: whether every chunk begins at a multiple of chunk_size.
      left: keys before the first query, a multiple of all blocks.
      length: queries of a row, a multiple of all blocks.
      blocks: sizes of blocks and the limit of memory.
      interpret: whether to run without a TPU.
    """

    heads: int
    key_width: int
    value_width: int
    chunk_size: int
    aligned: bool
    left: int
    length: int
    blocks: TpuBlocks
    interpret: bool

    def reach(self, queries: int, keys: int) -> int:
        """The most blocks of keys that a block of queries can see."""
        if self.aligned and self.chunk_size % queries == 0:
            return self.chunk_size // keys
        reach = -(-(self.chunk_size - 1) // keys) + queries // keys
        return min(reach, (self.left + self.length) // keys)

    def multiply(self, a: Array, b: Array, contract: tuple[int, int]) -> Array:
        """float32 product of two matrices over one axis of each."""
        precision = matmul_precision(a.dtype)
        if self.interpret:
            # XLA on CPU does not know every product of bfloat16 matrices.
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return lax.dot_general(
            a,
            b,
            (((contract[0],), (contract[1],)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def call(self, kernel: Any, *, name: str, products: int, grid: tuple, **options: Any) -> Any:
        """A pallas_call; `products` are multiply-adds for the cost estimate."""
        order = ("arbitrary",) * (len(grid) - 2)
        return pl.pallas_call(
            kernel,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", *order),
                vmem_limit_bytes=self.blocks.vmem_limit,
            ),
            cost_estimate=pl.CostEstimate(flops=2 * products, bytes_accessed=0, transcendentals=0),
            interpret=self.interpret,
            name=name,
            **options,
        )


def first_blocks(
    start: Int32[Array, "B L"], plan: Plan, queries: int, keys: int
) -> Int32[Array, "B blocks"]:
    """For every block of queries the first block of keys it sees; past its own if it sees none."""
    last = plan.left + jnp.arange(plan.length, dtype=jnp.int32)
    nothing = (plan.left + plan.length) // keys
    block = jnp.where(start <= last, start // keys, nothing)
    return block.reshape(start.shape[0], -1, queries).min(axis=2)


def attend_forward(
    plan: Plan,
    q: Float[Array, "B L H*Dk"],
    k: Float[Array, "B S H*Dk"],
    v: Float[Array, "B S H*Dv"],
    start: Int32[Array, "B L"],
) -> tuple[Float[Array, "B L H*Dv"], Float[Array, "B H 1 L"]]:
    """Outputs, and the logarithm of each query's softmax denominator; both 0 for no keys."""
    queries, keys = plan.blocks.queries, plan.blocks.keys
    reach = plan.reach(queries, keys)
    rows = q.shape[0]

    def key_block(b, h, i, w, first):
        return b, jnp.minimum(first[b, i] + w, _own_block(plan, i)), h

    def query_block(b, h, i, w, first):
        del w, first
        return b, i, h

    grid = (rows, plan.heads, plan.length // queries, reach)
    column = (queries, _LANES)
    return plan.call(
        functools.partial(_forward_kernel, plan, reach),
        name="chunk_attention_forward",
        products=rows
        * q.shape[1]
        * reach
        * keys
        * plan.heads
        * (plan.key_width + plan.value_width),
        grid=grid,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((None, queries, plan.key_width), query_block),
                pl.BlockSpec((None, keys, plan.key_width), key_block),
                pl.BlockSpec((None, keys, plan.value_width), key_block),
                pl.BlockSpec((None, 1, queries), lambda b, h, i, w, first: (b, 0, i)),
            ],
            out_specs=[
                pl.BlockSpec((None, queries, plan.value_width), query_block),
                pl.BlockSpec((None, None, 1, queries), lambda b, h, i, w, first: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((queries, plan.value_width), jnp.float32),
                pltpu.VMEM(column, jnp.float32),
                pltpu.VMEM(column, jnp.float32),
                pltpu.VMEM(column, jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*q.shape[:2], plan.heads * plan.value_width), v.dtype),
            jax.ShapeDtypeStruct((rows, plan.heads, 1, plan.length), jnp.float32),
        ],
    )(first_blocks(start, plan, queries, keys), q, k, v, start[:, None])


def _own_block(plan: Plan, number: Array) -> Array:
    """The last block of keys that a forward block of queries sees: that of its last token."""
    ratio = plan.blocks.queries // plan.blocks.keys
    return plan.left // plan.blocks.keys + (number + 1) * ratio - 1


def _forward_kernel(
    plan,
    reach,
    first,
    q_ref,
    k_ref,
    v_ref,
    start_ref,
    out_ref,
    lse_ref,
    sums,
    largest,
    total,
    starts,
):
    row, number, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    queries, keys = plan.blocks.queries, plan.blocks.keys
    block = first[row, number] + step

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        largest[...] = jnp.full_like(largest, _MASKED)
        total[...] = jnp.zeros_like(total)
        starts[...] = jnp.broadcast_to(start_ref[...], (_LANES, queries)).T

    @pl.when(block <= _own_block(plan, number))
    def _():
        scores = plan.multiply(q_ref[...], k_ref[...], (1, 1))
        key = block * keys + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        query = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        query += plan.left + number * queries
        allowed = (key <= query) & (key >= jnp.tile(starts[...], (1, keys // _LANES)))
        scores = jnp.where(allowed, scores, _MASKED)
        before = largest[...]
        largest[...] = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        decay = jnp.exp(before - largest[...])
        # A query that has seen no key yet must not add up those of other documents.
        weights = jnp.exp(scores - jnp.tile(largest[...], (1, keys // _LANES)))
        weights = jnp.where(allowed, weights, 0)
        total[...] = decay * total[...] + weights.sum(axis=1, keepdims=True)
        added = plan.multiply(weights.astype(v_ref.dtype), v_ref[...], (1, 0))
        sums[...] = jnp.tile(decay, (1, plan.value_width // _LANES)) * sums[...] + added

    @pl.when(step == reach - 1)
    def _():
        some = total[...] > 0
        divisor = jnp.where(some, total[...], 1.0)
        out = sums[...] * jnp.tile(1 / divisor, (1, plan.value_width // _LANES))
        out_ref[...] = out.astype(out_ref.dtype)
        lse_ref[...] = jnp.where(some, largest[...] + jnp.log(divisor), 0.0).T[:1]


def attend_backward(
    plan: Plan,
    q: Float[Array, "B L H*Dk"],
    k: Float[Array, "B S H*Dk"],
    v: Float[Array, "B S H*Dv"],
    start: Int32[Array, "B L"],
    lse: Float[Array, "B H 1 L"],
    mean: Float[Array, "B H 1 L"],
    d_out: Float[Array, "B L H*Dv"],
) -> tuple[Array, Array, Array]:
    """dq, dk, dv; `mean` is every query's sum of out * d_out.

    The grid goes through the blocks of keys; the queries that see one are its own block and
    reach - 1 after it. Their sums of dq wait in a ring of `reach` blocks until their own block of
    keys has come.
    """
    size, rows = plan.blocks.backward, q.shape[0]
    reach, lead = plan.reach(size, size), plan.left // size
    key_blocks, query_blocks = k.shape[1] // size, plan.length // size
    first = first_blocks(start, plan, size, size)
    # The last block of queries, counted from the first key, that sees a block of keys.
    number = jnp.arange(key_blocks, dtype=jnp.int32)
    sees = first[:, None, :] <= number[:, None]
    sees &= (lead + number[:query_blocks] - number[:, None] < reach)[None]
    last = jnp.where(sees, lead + number[:query_blocks], 0).max(axis=2)

    def query_number(b, j, w, last):
        return jnp.clip(jnp.minimum(j + w, last[b, j]), lead, key_blocks - 1) - lead

    def query_block(b, h, j, w, first, last):
        del first
        return b, query_number(b, j, w, last), h

    def query_row(b, h, j, w, first, last):
        del first
        return b, h, 0, query_number(b, j, w, last)

    def key_block(b, h, j, w, first, last):
        del w, first, last
        return b, j, h

    grid = (rows, plan.heads, key_blocks, reach)
    row_spec = pl.BlockSpec((None, None, 1, size), query_row)
    key_spec = pl.BlockSpec((None, size, plan.key_width), key_block)
    value_spec = pl.BlockSpec((None, size, plan.value_width), key_block)
    products = 3 * plan.key_width + 2 * plan.value_width
    return plan.call(
        functools.partial(_backward_kernel, plan, reach),
        name="chunk_attention_backward",
        products=rows * k.shape[1] * reach * size * plan.heads * products,
        grid=grid,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[
                pl.BlockSpec((None, size, plan.key_width), query_block),
                pl.BlockSpec((None, size, plan.value_width), query_block),
                row_spec,
                row_spec,
                pl.BlockSpec(
                    (None, 1, size), lambda b, h, j, w, f, last: (b, 0, query_number(b, j, w, last))
                ),
                key_spec,
                value_spec,
            ],
            out_specs=[
                pl.BlockSpec(
                    (None, size, plan.key_width),
                    lambda b, h, j, w, f, last: (b, jnp.maximum(j - lead, 0), h),
                ),
                key_spec,
                value_spec,
            ],
            scratch_shapes=[
                pltpu.VMEM((reach, size, plan.key_width), jnp.float32),
                pltpu.VMEM((size, plan.key_width), jnp.float32),
                pltpu.VMEM((size, plan.value_width), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
    )(first, last, q, d_out, lse, mean, start[:, None], k, v)


def _backward_kernel(
    plan, reach, first, last, q_ref, d_out_ref, lse_ref, mean_ref, start_ref, k_ref, v_ref,
    dq_ref, dk_ref, dv_ref, dq_ring, dk_sums, dv_sums,
):  # fmt: skip
    del last
    row, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    size = plan.blocks.backward
    lead, blocks = plan.left // size, plan.length // size
    number = block + step - lead
    slot = lax.rem(block + step, reach)

    @pl.when(step == 0)
    def _():
        dk_sums[...] = jnp.zeros_like(dk_sums)
        dv_sums[...] = jnp.zeros_like(dv_sums)

    # The first block of keys that can reach these queries.
    @pl.when((step == reach - 1) | (block == 0))
    def _():
        dq_ring[slot] = jnp.zeros(dq_ring.shape[1:], dq_ring.dtype)

    is_block = (number >= 0) & (number < blocks)
    safe = jnp.clip(number, 0, blocks - 1)

    @pl.when(is_block & (first[row, safe] <= block))
    def _():
        q, k, d_out = q_ref[...], k_ref[...], d_out_ref[...]
        # Transposed, keys by queries, which leaves one matrix to be turned: that of dq.
        scores = plan.multiply(k, q, (1, 1))
        key = block * size + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        query = (block + step) * size + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        allowed = (key <= query) & (key >= start_ref[...])
        weights = jnp.where(allowed, jnp.exp(scores - lse_ref[...]), 0)
        dv_sums[...] += plan.multiply(weights.astype(d_out.dtype), d_out, (1, 0))
        d_weights = plan.multiply(v_ref[...], d_out, (1, 1))
        # Products with another document may be infinite, and 0 times infinity is a NaN.
        d_scores = jnp.where(allowed, weights * (d_weights - mean_ref[...]), 0)
        dk_sums[...] += plan.multiply(d_scores.astype(q.dtype), q, (1, 0))
        dq_ring[slot] += plan.multiply(d_scores.T.astype(k.dtype), k, (1, 0))

    @pl.when((step == 0) & (block >= lead))
    def _():
        dq_ref[...] = dq_ring[slot].astype(dq_ref.dtype)

    @pl.when(step == reach - 1)
    def _():
        dk_ref[...] = dk_sums[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sums[...].astype(dv_ref.dtype)
