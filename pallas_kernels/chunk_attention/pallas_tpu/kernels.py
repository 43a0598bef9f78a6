"""The kernels of chunk attention on TPU: attention of queries to intervals of keys.

Grid axes of both kernels: row, head, block, and step over the blocks that it meets. A step whose
blocks do not see each other computes nothing, and its index maps repeat the previous block, so that
nothing is fetched either.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.chunk_attention.pallas_tpu.block_sizes import LANES, AttentionTpuBlocks
from pallas_kernels.chunk_attention.types import matmul_precision

# Finite: the difference of two infinities is NaN.
_MASKED_SCORE = -1e38


@dataclasses.dataclass(frozen=True)
class AttentionTpuPlan:
    """Static sizes of one call.

    Attributes:
      heads: heads H.
      key_width: padded width of a head of q and k, a multiple of 128.
      value_width: padded width of a head of v, a multiple of 128.
      chunk_size: tokens C in a chunk; no query reaches a key C or more tokens before it.
      is_aligned: whether every chunk begins at a multiple of C in its row.
      key_offset: keys before the first query's own, a multiple of all block sizes.
      length: queries of a row, a multiple of all block sizes.
      blocks: block sizes and the VMEM limit.
      interpret: whether to run in the interpreter.
    """

    heads: int
    key_width: int
    value_width: int
    chunk_size: int
    is_aligned: bool
    key_offset: int
    length: int
    blocks: AttentionTpuBlocks
    interpret: bool

    def reach(self, queries: int, keys: int) -> int:
        """Upper bound on the blocks of `keys` keys that a block of `queries` queries sees."""
        if self.is_aligned and self.chunk_size % queries == 0:
            return self.chunk_size // keys
        reach = -(-(self.chunk_size - 1) // keys) + queries // keys
        return min(reach, (self.key_offset + self.length) // keys)

    def diagonal_block(self, query_block: Any) -> Any:
        """The last block of keys that a forward block of queries sees: that of its last token."""
        ratio = self.blocks.queries // self.blocks.keys
        return self.key_offset // self.blocks.keys + (query_block + 1) * ratio - 1

    def dot(self, a: Array, b: Array, contract: tuple[int, int]) -> Array:
        """float32 product of two matrices over one axis of each."""
        precision = matmul_precision(a.dtype)
        if self.interpret:
            # XLA on CPU lacks some products of bfloat16 matrices.
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return lax.dot_general(
            a,
            b,
            (((contract[0],), (contract[1],)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )


class ForwardRefs(NamedTuple):
    """References of the forward kernel.

    Attributes:
      first: first block of keys of every row and block of queries, prefetched.
      q: (queries, Dk).
      k: (keys, Dk).
      v: (keys, Dv).
      start: (1, queries), first key of every query.
      out: (queries, Dv).
      lse: (1, queries), natural logarithm of the softmax denominators, 0 without keys.
      acc: (queries, Dv) float32 scratch, sums of weighted values.
      m_i: (queries, 128) scratch, greatest score so far, the same in all lanes.
      l_i: (queries, 128) scratch, sum of exponentials so far.
      start_column: (queries, 128) scratch, `start` transposed.
    """

    first: Any
    q: Any
    k: Any
    v: Any
    start: Any
    out: Any
    lse: Any
    acc: Any
    m_i: Any
    l_i: Any
    start_column: Any


def forward_kernel(plan: AttentionTpuPlan, reach: int, refs: ForwardRefs) -> None:
    """One block of queries and one of the keys that it sees: an online softmax."""
    row, query_block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    queries, keys = plan.blocks.queries, plan.blocks.keys
    key_block = refs.first[row, query_block] + step

    @pl.when(step == 0)
    def _():
        refs.acc[...] = jnp.zeros_like(refs.acc)
        refs.m_i[...] = jnp.full_like(refs.m_i, _MASKED_SCORE)
        refs.l_i[...] = jnp.zeros_like(refs.l_i)
        refs.start_column[...] = jnp.broadcast_to(refs.start[...], (LANES, queries)).T

    @pl.when(key_block <= plan.diagonal_block(query_block))
    def _():
        scores = plan.dot(refs.q[...], refs.k[...], (1, 1))
        key = key_block * keys + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        own_key = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        own_key += plan.key_offset + query_block * queries
        allowed = (key <= own_key) & (key >= jnp.tile(refs.start_column[...], (1, keys // LANES)))
        scores = jnp.where(allowed, scores, _MASKED_SCORE)
        previous_m_i = refs.m_i[...]
        refs.m_i[...] = jnp.maximum(previous_m_i, scores.max(axis=1, keepdims=True))
        rescale = jnp.exp(previous_m_i - refs.m_i[...])
        # exp(masked - masked) is 1 for a query that has seen no key yet.
        weights = jnp.exp(scores - jnp.tile(refs.m_i[...], (1, keys // LANES)))
        weights = jnp.where(allowed, weights, 0)
        refs.l_i[...] = rescale * refs.l_i[...] + weights.sum(axis=1, keepdims=True)
        product = plan.dot(weights.astype(refs.v.dtype), refs.v[...], (1, 0))
        rescale = jnp.tile(rescale, (1, plan.value_width // LANES))
        refs.acc[...] = rescale * refs.acc[...] + product

    @pl.when(step == reach - 1)
    def _():
        has_keys = refs.l_i[...] > 0
        divisor = jnp.where(has_keys, refs.l_i[...], 1.0)
        out = refs.acc[...] * jnp.tile(1 / divisor, (1, plan.value_width // LANES))
        refs.out[...] = out.astype(refs.out.dtype)
        lse = jnp.where(has_keys, refs.m_i[...] + jnp.log(divisor), 0.0)
        refs.lse[...] = lse.T[:1]


class BackwardRefs(NamedTuple):
    """References of the backward kernel; blocks of S queries and S keys.

    Attributes:
      first: first block of keys of every row and block of queries, prefetched.
      last: last block of queries of every row and block of keys, for the index maps.
      q: (S, Dk).
      do: (S, Dv).
      lse: (1, S).
      delta: (1, S), sum of out * do.
      start: (1, S), first key of every query.
      k: (S, Dk).
      v: (S, Dv).
      dq: (S, Dk).
      dk: (S, Dk).
      dv: (S, Dv).
      dq_ring: (reach, S, Dk) float32 scratch, sums of the blocks of queries in reach.
      dk_acc: (S, Dk) float32 scratch.
      dv_acc: (S, Dv) float32 scratch.
    """

    first: Any
    last: Any
    q: Any
    do: Any
    lse: Any
    delta: Any
    start: Any
    k: Any
    v: Any
    dq: Any
    dk: Any
    dv: Any
    dq_ring: Any
    dk_acc: Any
    dv_acc: Any


def backward_kernel(plan: AttentionTpuPlan, reach: int, refs: BackwardRefs) -> None:
    """One block of keys and one of the queries that see it: dk, dv, and its share of dq.

    A block of queries is complete when its diagonal block of keys has come, the last that it sees.
    Until then its dq is summed in a ring of `reach` blocks.
    """
    row, key_block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    size = plan.blocks.backward
    offset_blocks, num_query_blocks = plan.key_offset // size, plan.length // size
    query_block = key_block + step - offset_blocks
    slot = lax.rem(key_block + step, reach)

    @pl.when(step == 0)
    def _():
        refs.dk_acc[...] = jnp.zeros_like(refs.dk_acc)
        refs.dv_acc[...] = jnp.zeros_like(refs.dv_acc)

    # The first block of keys that can reach these queries.
    @pl.when((step == reach - 1) | (key_block == 0))
    def _():
        refs.dq_ring[slot] = jnp.zeros(refs.dq_ring.shape[1:], refs.dq_ring.dtype)

    exists = (query_block >= 0) & (query_block < num_query_blocks)
    clipped = jnp.clip(query_block, 0, num_query_blocks - 1)

    @pl.when(exists & (refs.first[row, clipped] <= key_block))
    def _():
        q, k, do = refs.q[...], refs.k[...], refs.do[...]
        # Keys by queries: of the products only dq's needs a transposed matrix.
        scores = plan.dot(k, q, (1, 1))
        key = key_block * size + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        own_key = (key_block + step) * size + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        allowed = (key <= own_key) & (key >= refs.start[...])
        weights = jnp.where(allowed, jnp.exp(scores - refs.lse[...]), 0)
        refs.dv_acc[...] += plan.dot(weights.astype(do.dtype), do, (1, 0))
        d_weights = plan.dot(refs.v[...], do, (1, 1))
        # Products with another document may be infinite, and 0 times infinity is NaN.
        d_scores = jnp.where(allowed, weights * (d_weights - refs.delta[...]), 0)
        refs.dk_acc[...] += plan.dot(d_scores.astype(q.dtype), q, (1, 0))
        refs.dq_ring[slot] += plan.dot(d_scores.T.astype(k.dtype), k, (1, 0))

    @pl.when((step == 0) & (key_block >= offset_blocks))
    def _():
        refs.dq[...] = refs.dq_ring[slot].astype(refs.dq.dtype)

    @pl.when(step == reach - 1)
    def _():
        refs.dk[...] = refs.dk_acc[...].astype(refs.dk.dtype)
        refs.dv[...] = refs.dv_acc[...].astype(refs.dv.dtype)
