"""Causal attention in plain JAX for any platform, without L x L scores.

It is interval attention of `pallas_kernels.chunk_attention`: a query sees the keys from the start
of its document or window to its own. A row without a window is one chunk.
"""

import dataclasses
import math

import jax
import jax.export
import jax.numpy as jnp

from megalodon_jax.baselines.documents import (
    document_starts,
    pad_tokens,
    repeat_heads,
    zero_padding,
)
from megalodon_jax.typing import Array, Float, Int32
from pallas_kernels.chunk_attention.blocks import AttentionBlocks, attend_blocks

# Scores of one step: 256 MiB of float32, unless one head of one row needs more.
_MAX_SCORES = 1 << 26
# Tiles are written out in the program: more of them compile for longer.
_MAX_TILES = 32


def causal_attention(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    *,
    window: int | None,
    segment_ids: Int32[Array, "B L"] | None,
) -> Float[Array, "B L H d"]:
    """Blocked attention with a backward pass that recomputes scores.

    Scores take 256 MiB, or L²/8 numbers of float32 if that is less. From L = 46,000 on, without a
    window, one head alone needs more: L²/32 numbers, 2 GiB at L = 131,072.

    Arguments as in `attention.causal_attention`.
    """
    L, H = q.shape[1:3]
    q, k, v = zero_padding((q, k, v), segment_ids)
    q = q * jnp.asarray(1 / math.sqrt(q.shape[3]), q.dtype)
    k, v = repeat_heads(k, H), repeat_heads(v, H)
    reach = L if window is None else min(window, L)
    key_offset = reach if reach < L else 0
    sizes = AttentionBlocks.make(q.shape, reach, key_offset=key_offset)
    start = _first_keys((q.shape[0], L), window, segment_ids)
    after = sizes.length - L
    q, k, v = (pad_tokens(x, after) for x in (q, k, v))
    k, v = (jnp.pad(x, ((0, 0), (key_offset, 0), (0, 0), (0, 0))) for x in (k, v))
    if start is not None:
        # Padding after the row sees no key.
        beyond = key_offset + sizes.length
        start = jnp.pad(start + key_offset, ((0, 0), (0, after)), constant_values=beyond)
    return _attend(sizes, q, k, v, start)[:, :L]


def _first_keys(
    shape: tuple[int, int], window: int | None, segment_ids: Int32[Array, "B L"] | None
) -> Int32[Array, "B L"] | None:
    """The first key that every query sees; the key after its own for padding, which sees none."""
    L = shape[1]
    if segment_ids is None and (window is None or window >= L):
        return None
    index = jnp.arange(L, dtype=jnp.int32)
    start = jnp.zeros(shape, jnp.int32) if window is None else index - (window - 1)
    start = jnp.broadcast_to(jnp.maximum(start, 0), shape)
    if segment_ids is None:
        return start
    start = jnp.maximum(start, document_starts(segment_ids))
    return jnp.where(segment_ids != 0, start, index + 1)


def _attend(
    sizes: AttentionBlocks,
    q: Float[Array, "B Lq H d"],
    k: Float[Array, "B Lk H d"],
    v: Float[Array, "B Lk H d"],
    start: Int32[Array, "B Lq"] | None,
) -> Float[Array, "B Lq H d"]:
    """`attend_blocks`, for all rows and heads at once or in a loop over some of them."""
    B, Lq, H, d = q.shape
    keys = sizes.key_offset + sizes.block_size
    is_symbolic = jax.export.is_symbolic_dim(B)
    if not is_symbolic and B * H * sizes.tile_size * keys <= _MAX_SCORES:
        return attend_blocks(sizes, q, k, v, start, None)
    if start is None:
        start = jnp.zeros((B, Lq), jnp.int32)
    tile = sizes.tile_size
    while tile * keys > _MAX_SCORES and 2 * sizes.block_size <= _MAX_TILES * tile:
        tile //= 2
    most = max(1, _MAX_SCORES // (tile * keys))
    divisible = int(H if is_symbolic else B * H)
    lanes = max(n for n in range(1, min(most, divisible) + 1) if divisible % n == 0)
    sizes = dataclasses.replace(sizes, tile_size=tile, blocks_per_group=1)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x, 2, 1).reshape(B * H // lanes, lanes, x.shape[1], 1, d)

    starts = jnp.broadcast_to(start[:, None], (B, H, Lq)).reshape(-1, lanes, Lq)
    out = jax.lax.map(
        lambda operands: attend_blocks(sizes, *operands, dropout=None),
        (split(q), split(k), split(v), starts),
    )
    return jnp.moveaxis(out.reshape(B, H, Lq, d), 1, 2)
