"""Attention of pieces that continue each row's cached document: the fast paths of prefill.

Other pieces, which begin documents inside a row or have padding, go through `cached`.
"""

import math

import jax
import jax.numpy as jnp

from megalodon_jax.baselines import cudnn
from megalodon_jax.baselines.attention import causal_attention
from megalodon_jax.typing import Array, Float, Float32, Int32
from pallas_kernels.chunk_attention.types import (
    KeyValueCache,
    accumulation_dtype,
    matmul_precision,
)
from pallas_kernels.common.target import find_target

# Scores that exist at once.
_MAX_SCORES = 1 << 24
# Largest blocks of queries and of keys. Two CPU cores take 0.76 s for 2,048 queries, 8,192 slots
# and 8 heads of 64 with blocks of 256, 1.9 s with 1,024; accelerators would wait for small ones.
_MAX_BLOCK_CPU = 256
_MAX_BLOCK = 1024


def attend_to_cache(
    q: Float[Array, "B L H d"],
    cache: KeyValueCache,
    positions: Int32[Array, "B L"],
) -> Float32[Array, "B L H d"]:
    """Full causal attention to a cache that holds the new tokens already, by blocks of keys.

    Blocks that no query of a block sees are not computed: the cost follows the context and not the
    room of the cache. The softmax is that of FlashAttention (Dao et al. 2022): sums and maxima are
    corrected from block to block.

    Args:
      q: queries of the new tokens.
      cache: a token of position p is in slot p; later slots may hold anything.
      positions: of the new tokens, ascending in every row.
    """
    B, L, H, d = q.shape
    K, S = cache.key.shape[1:3]
    largest = _MAX_BLOCK_CPU if find_target().platform == "cpu" else _MAX_BLOCK
    keys = min(S, largest)
    queries = min(L, max(16, min(largest, _MAX_SCORES // (B * H * keys))))
    count = -(-L // queries)
    after = count * queries - L

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, after), *[(0, 0)] * (x.ndim - 2)), mode="edge")
        return jnp.moveaxis(x.reshape(B, count, queries, *x.shape[2:]), 1, 0)

    def attend(block: tuple[Array, Array]) -> Array:
        return _attend_block(*block, cache, keys)

    grouped = (q * jnp.asarray(1 / math.sqrt(d), q.dtype)).reshape(B, L, K, -1, d)
    out = jax.lax.map(attend, (split(grouped), split(positions)))
    return jnp.moveaxis(out, 0, 1).reshape(B, count * queries, H, d)[:, :L]


def _attend_block(
    q: Float[Array, "B Q K G d"],
    positions: Int32[Array, "B Q"],
    cache: KeyValueCache,
    size: int,
) -> Float32[Array, "B Q K G d"]:
    """A block of queries to all blocks of `size` keys up to the last position."""
    wide, precision = accumulation_dtype(q.dtype), matmul_precision(q.dtype)
    S = cache.key.shape[2]
    shape = (q.shape[0], *q.shape[2:4], q.shape[1])
    dtypes = {"precision": precision, "preferred_element_type": wide}

    def add(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, out = sums
        # The last block begins earlier where the slots are not a multiple of the size.
        start = jnp.minimum(i * size, S - size)
        key, value = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in cache)
        slot = start + jnp.arange(size)
        allowed = (slot >= i * size) & (slot <= positions[:, :, None])
        allowed = allowed[:, None, None]
        # Slots that hold no token may hold NaN, and 0 times NaN is NaN.
        value = jnp.where((slot <= positions[:, -1:])[:, None, :, None], value, 0)
        scores = jnp.einsum("bqkgd,bksd->bkgqs", q, key, **dtypes)
        scores = jnp.where(allowed, scores, jnp.finfo(wide).min)
        new_highest = jnp.maximum(highest, scores.max(-1))
        weights = jnp.where(allowed, jnp.exp(scores - new_highest[..., None]), 0)
        correction = jnp.exp(highest - new_highest)
        added = jnp.einsum("bkgqs,bksd->bkgqd", weights.astype(value.dtype), value, **dtypes)
        return (
            new_highest,
            total * correction + weights.sum(-1),
            out * correction[..., None] + added,
        )

    zeros = jnp.zeros(shape, wide)
    start = (zeros + jnp.finfo(wide).min, zeros, jnp.zeros((*shape, q.shape[-1]), wide))
    num_blocks = jnp.max(positions) // size + 1
    _, total, out = jax.lax.fori_loop(0, num_blocks, add, start)
    return jnp.transpose(out / total[..., None], (0, 3, 1, 2, 4))


def attend_by_cudnn(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    cache: KeyValueCache,
    num_cached: Int32[Array, " B"],
) -> Float32[Array, "B L H d"]:
    """The same by cuDNN: two softmaxes, over the tokens before and the new ones, joined into one.

    out = Σ_i exp(l_i) out_i / Σ_i exp(l_i), where l_i is the log of the sum of the exponentials of
    the scores of these keys.

    Args:
      q: queries of the new tokens.
      k: keys of the new tokens.
      v: values of the new tokens.
      cache: a token of position p is in slot p; it may hold the new tokens already, so that it
        is updated in place.
      num_cached: tokens before the new ones.
    """
    L = q.shape[1]
    is_held = jnp.arange(cache.value.shape[2]) < num_cached[:, None]
    key, value = (jnp.where(is_held[:, None, :, None], x, 0) for x in cache)
    # cuDNN gives logarithms for even lengths alone; a token behind the others changes none.
    q, k, v = (_with_even_length(x.swapaxes(1, 2)) for x in (q, k, v))
    key, value = map(_with_even_length, (key, value))
    # An empty row is a row of one key, whose weight is 0.
    num_keys = jnp.clip(num_cached, 1, cache.key.shape[2])
    old = cudnn.attend_with_logsumexp(q, key, value, num_keys=num_keys, is_causal=False)
    new = cudnn.attend_with_logsumexp(q, k, v, num_keys=None, is_causal=True)
    logsumexp = jnp.where(num_cached[:, None, None] > 0, old.logsumexp, -jnp.inf)
    share = jax.nn.sigmoid(logsumexp - new.logsumexp)[..., None]
    out = jnp.where(share > 0, share * old.out, 0) + (1 - share) * new.out
    return out.swapaxes(1, 2)[:, :L]


def _with_even_length(x: Float[Array, "B K L d"]) -> Float[Array, "B K M d"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, x.shape[2] % 2), (0, 0)))


def attend_in_window(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    cache: KeyValueCache,
    num_cached: Int32[Array, " B"],
    window: int,
) -> Float[Array, "B L H d"]:
    """Sliding-window attention: one row of the cached and the new tokens, by `causal_attention`.

    Args:
      q: queries of the new tokens.
      k: keys of the new tokens.
      v: values of the new tokens.
      cache: a ring of S slots; a token of position p is in slot p % S.
      num_cached: tokens that the row has had.
      window: tokens that a query sees, its own included; at most S.
    """
    S = cache.key.shape[2]
    # The position in column j is num_cached - S + j; it is negative where there is no token.
    column = jnp.arange(S, dtype=jnp.int32)
    slot = (num_cached[:, None] + column) % S
    is_held = column >= S - num_cached[:, None]

    def in_order(slots: Float[Array, "B K S d"]) -> Float[Array, "B S K d"]:
        taken = jnp.take_along_axis(slots, slot[:, None, :, None], axis=2)
        return jnp.where(is_held[:, :, None, None], taken.swapaxes(1, 2), 0)

    key, value = map(in_order, cache)
    row = (
        jnp.pad(q, ((0, 0), (S, 0), (0, 0), (0, 0))),
        jnp.concatenate([key.astype(k.dtype), k], axis=1),
        jnp.concatenate([value.astype(v.dtype), v], axis=1),
    )
    segment_ids = jnp.pad(is_held.astype(jnp.int32), ((0, 0), (0, k.shape[1])), constant_values=1)
    return causal_attention(*row, window=window, segment_ids=segment_ids)[:, S:]
