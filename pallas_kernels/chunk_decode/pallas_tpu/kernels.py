"""The kernel of chunk decoding for TPU: a block of slots of a row's head in every grid step.

The softmax has a running maximum m and sum l. A step after the token's slot does nothing, and its
blocks are those of the last filled one: nothing is fetched for it. The step with the token's slot
also writes the token's key and value: a few slots around its own, the others as they were.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.chunk_attention.types import matmul_precision


class DecodeRefs(NamedTuple):
    """References of a grid step; scales are None where the cache has no 8-bit integers.

    Attributes:
      slot: (B,), the slot of each row's token.
      k: (1, Dk), the token's key in the cache's dtype.
      v: (1, Dv), its value.
      q: (queries, Dk), the query in row 0, zeros in the others: a product needs that many rows.
      key: (T, Dk), of a block of slots.
      value: (T, Dv).
      key_scale: (1, T), the token's own included.
      value_scale: (1, T).
      gate: (1, Dv); may be None.
      out: (1, Dv).
      new_key: (W, Dk), the slots around the token's, in the memory of the cache.
      new_value: (W, Dv).
      acc: (queries, Dv), sum of weighted values, float32.
      m_i: (queries, 128), greatest score so far.
      l_i: (queries, 128), sum of weights so far.
    """

    slot: Any
    k: Any
    v: Any
    q: Any
    key: Any
    value: Any
    key_scale: Any
    value_scale: Any
    gate: Any
    out: Any
    new_key: Any
    new_value: Any
    acc: Any
    m_i: Any
    l_i: Any


def decode_kernel(refs: DecodeRefs, *, size: int) -> None:
    """One block of `size` slots."""
    step, slot = pl.program_id(2), refs.slot[pl.program_id(0)]
    last = lax.div(slot, size)

    @pl.when(step == 0)
    def _():
        refs.m_i[...] = jnp.full_like(refs.m_i, -jnp.inf)
        refs.l_i[...] = jnp.zeros_like(refs.l_i)
        refs.acc[...] = jnp.zeros_like(refs.acc)

    # Only the block with the token's slot has others that are empty, which may hold NaN.
    pl.when(step < last)(lambda: _add_block(refs, None))

    @pl.when(step == last)
    def _():
        _add_block(refs, slot - step * size)
        result = refs.acc[0:1] / refs.l_i[0:1, 0:1]
        if refs.gate is not None:
            result = result * jax.nn.silu(refs.gate[...].astype(jnp.float32))
        refs.out[...] = result.astype(refs.out.dtype)
        own = slot - step * size
        _write_token(refs.new_key, refs.key, refs.k, own)
        _write_token(refs.new_value, refs.value, refs.v, own)


def _write_token(written: Any, block: Any, token: Any, own: Any) -> None:
    """The slots around the token's own with the token in it."""
    count = written.shape[0]
    first = pl.multiple_of(lax.div(own, count) * count, count)
    # Through float32, which holds every number of the cache: older TPUs select no narrow ones.
    old = block[pl.ds(first, count)].astype(jnp.float32)
    is_own = lax.broadcasted_iota(jnp.int32, old.shape, 0) == own - first
    new = jnp.where(is_own, token[...].astype(jnp.float32), old)
    written[...] = new.astype(written.dtype)


def _add_block(refs: DecodeRefs, last_slot: Any | None) -> None:
    """Adds a block's slots; of the token's block those up to `last_slot`, which is the token's."""
    dtype = refs.q.dtype
    key, value = refs.key[...].astype(dtype), refs.value[...].astype(dtype)
    if last_slot is not None:
        index = lax.broadcasted_iota(jnp.int32, (key.shape[0], 1), 0)
        key = jnp.where(index == last_slot, refs.k[...].astype(dtype), key)
        value = jnp.where(index < last_slot, value, 0)
        value = jnp.where(index == last_slot, refs.v[...].astype(dtype), value)
    scores = _multiply(refs.q[...], key, contracted=1)
    if refs.key_scale is not None:
        scores = scores * refs.key_scale[...]
    is_filled = None
    if last_slot is not None:
        is_filled = lax.broadcasted_iota(jnp.int32, scores.shape, 1) <= last_slot
        scores = jnp.where(is_filled, scores, -jnp.inf)
    old_m_i = refs.m_i[:, 0:1]
    m_i = jnp.maximum(old_m_i, scores.max(axis=1, keepdims=True))
    weights, decay = jnp.exp(scores - m_i), jnp.exp(old_m_i - m_i)
    refs.m_i[...] = jnp.broadcast_to(m_i, refs.m_i.shape)
    refs.l_i[...] = refs.l_i[...] * decay + weights.sum(axis=1, keepdims=True)
    if refs.value_scale is not None:
        weights = weights * refs.value_scale[...]
        weights = weights if is_filled is None else jnp.where(is_filled, weights, 0)
    refs.acc[...] = refs.acc[...] * decay + _multiply(weights.astype(dtype), value, contracted=0)


def _multiply(x: Any, matrix: Any, *, contracted: int) -> Any:
    return lax.dot_general(
        x,
        matrix,
        (((1,), (contracted,)), ((), ())),
        precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
