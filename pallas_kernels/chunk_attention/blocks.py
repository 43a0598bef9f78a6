"""Interval attention in blocks, with a backward pass that recomputes scores: the core of `xla`.

A row's queries form `num_blocks` blocks. A block sees a window of keys: those of its own tokens and
the `key_offset` keys before them. Inside a block, tiles of queries skip the keys that no query of
the tile can reach, which saves work without data-dependent shapes. Blocks run in groups whose
scores stay under a fixed size.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple, Self

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    accumulation_dtype,
    dropout_masks,
    matmul_precision,
)
from pallas_kernels.common.residuals import name_residuals

# Scores of one tile of all blocks of a group: 256 MiB of float32.
_MAX_SCORES = 1 << 26


class _QueryTile(NamedTuple):
    """A tile of a block's queries, and the keys of the block's window that it can reach."""

    index: int
    queries: slice
    keys: slice


@dataclasses.dataclass(frozen=True)
class AttentionBlocks:
    """Static sizes of one call.

    Attributes:
      chunk_size: tokens C in a chunk; no query reaches a key C or more tokens before it.
      key_offset: keys before the first query's own (0 or C).
      block_size: queries in a block; C if there is more than one block.
      num_blocks: blocks in a row.
      blocks_per_group: blocks computed in one step; divides `num_blocks`.
      tile_size: queries in a tile.
    """

    chunk_size: int
    key_offset: int
    block_size: int
    num_blocks: int
    blocks_per_group: int
    tile_size: int

    @classmethod
    def make(cls, q_shape: tuple[int, ...], chunk_size: int, *, key_offset: int) -> Self:
        """Sizes for queries of shape (B, L, H, Dk)."""
        B, L, H, _ = q_shape
        block = min(chunk_size, L)
        blocks = -(-L // block)
        # 8 tiles do 9/16 of a dense chunk's work (the minimum is 1/2). Tiles of fewer than 128
        # queries are slower.
        tile = min(block, max(128, -(-block // 8)))
        if jax.export.is_symbolic_dim(B):
            most = 1  # the rows are not known: the smallest group
        else:
            scores = B * H * tile * (key_offset + block)
            most = min(blocks, max(1, _MAX_SCORES // scores))
        group = max(size for size in range(1, most + 1) if blocks % size == 0)
        return cls(chunk_size, key_offset, block, blocks, group, tile)

    @property
    def length(self) -> int:
        """Queries in a row, padding included."""
        return self.block_size * self.num_blocks

    @property
    def tokens_per_group(self) -> int:
        """Queries in a group."""
        return self.blocks_per_group * self.block_size

    def tiles(self) -> Iterator[_QueryTile]:
        """Tiles of a block."""
        for index, begin in enumerate(range(0, self.block_size, self.tile_size)):
            end = min(begin + self.tile_size, self.block_size)
            first_key = max(0, self.key_offset + begin - self.chunk_size + 1)
            yield _QueryTile(index, slice(begin, end), slice(first_key, self.key_offset + end))


class _GroupOperands(NamedTuple):
    """One group: g blocks of S queries, with a window of W = key_offset + S keys each."""

    q: Float[Array, "B g S H Dk"]
    k: Float[Array, "B g W H Dk"]
    v: Float[Array, "B g W H Dv"]
    start: Int32[Array, "B g S"] | None


def attend_blocks(
    sizes: AttentionBlocks,
    q: Float[Array, "B Lq H Dk"],
    k: Float[Array, "B Lk H Dk"],
    v: Float[Array, "B Lk H Dv"],
    start: Int32[Array, "B Lq"] | None,
    dropout: AttentionDropout | None,
) -> Float[Array, "B Lq H Dv"]:
    """Attention of query t to keys start[t] .. key_offset + t; an empty interval gives 0.

    Args:
      sizes: static sizes; Lq = sizes.length, Lk = sizes.key_offset + sizes.length.
      q: queries.
      k: keys.
      v: values.
      start: first key of every query; None: the first key of the query's block.
      dropout: attention dropout.
    """
    return _attend(sizes, q, k, v, start, dropout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sizes, q, k, v, start, dropout):
    return _attend_forward(sizes, q, k, v, start, dropout)[0]


def _attend_forward(sizes: AttentionBlocks, q, k, v, start, dropout):
    B, H = q.shape[0], q.shape[2]
    step = sizes.tokens_per_group

    def body(group_index: Array | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = carry
        out_group, lse_group = _attend_group(
            sizes, _take_group(sizes, group_index, q, k, v, start), _fold_in(dropout, group_index)
        )
        out = jax.lax.dynamic_update_slice_in_dim(
            out, out_group.reshape(B, step, *out.shape[2:]), group_index * step, axis=1
        )
        lse = jax.lax.dynamic_update_slice_in_dim(
            lse, lse_group, group_index * sizes.blocks_per_group, axis=1
        )
        return out, lse

    carry = (
        jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype),
        jnp.zeros((B, sizes.num_blocks, H, sizes.block_size), accumulation_dtype(q.dtype)),
    )
    out, lse = name_residuals(_for_each_group(sizes, body, carry), "chunk_attention")
    return out, (q, k, v, start, dropout, lse)


def _attend_backward(sizes: AttentionBlocks, residuals, do):
    q, k, v, start, dropout, lse = residuals
    B, step = q.shape[0], sizes.tokens_per_group

    def body(group_index: Array | int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        dq, dk, dv, dk_overlap, dv_overlap = carry
        blocks = sizes.blocks_per_group
        dq_group, dk_group, dv_group = _attend_group_backward(
            sizes,
            _take_group(sizes, group_index, q, k, v, start),
            jax.lax.dynamic_slice_in_dim(lse, group_index * blocks, blocks, axis=1),
            _split_blocks(sizes, do, group_index),
            _fold_in(dropout, group_index),
        )
        dk, dk_overlap = _write_overlapping(sizes, group_index, dk, dk_overlap, dk_group)
        dv, dv_overlap = _write_overlapping(sizes, group_index, dv, dv_overlap, dv_group)
        dq = jax.lax.dynamic_update_slice_in_dim(
            dq, dq_group.reshape(B, step, *dq.shape[2:]), group_index * step, axis=1
        )
        return dq, dk, dv, dk_overlap, dv_overlap

    wide = accumulation_dtype(q.dtype)
    carry = (
        *(jnp.zeros_like(x) for x in (q, k, v)),
        *(jnp.zeros((B, sizes.key_offset, *x.shape[2:]), wide) for x in (k, v)),
    )
    dq, dk, dv, _, _ = _for_each_group(sizes, body, carry)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _for_each_group(sizes: AttentionBlocks, body, carry):
    groups = sizes.num_blocks // sizes.blocks_per_group
    return body(0, carry) if groups == 1 else jax.lax.fori_loop(0, groups, body, carry)


def _fold_in(dropout: AttentionDropout | None, index: Array | int) -> AttentionDropout | None:
    if dropout is None:
        return None
    return dataclasses.replace(dropout, key=jax.random.fold_in(dropout.key, index))


def _split_blocks(sizes: AttentionBlocks, x: Array, group_index: Array | int) -> Array:
    step = sizes.tokens_per_group
    x = jax.lax.dynamic_slice_in_dim(x, group_index * step, step, axis=1)
    return x.reshape(x.shape[0], sizes.blocks_per_group, sizes.block_size, *x.shape[2:])


def _take_group(sizes: AttentionBlocks, group_index: Array | int, q, k, v, start) -> _GroupOperands:
    step = sizes.tokens_per_group
    if start is not None:
        # From indices into the row's keys to indices into the block's window.
        first = group_index * sizes.blocks_per_group
        block = first + jnp.arange(sizes.blocks_per_group, dtype=jnp.int32)
        start = _split_blocks(sizes, start, group_index) - sizes.block_size * block[:, None]

    def windows(x: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(x, group_index * step, sizes.key_offset + step, axis=1)
        if sizes.blocks_per_group == 1:
            return row[:, None]
        blocks = row.reshape(row.shape[0], -1, sizes.block_size, *row.shape[2:])
        if not sizes.key_offset:
            return blocks
        return jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=2)

    return _GroupOperands(_split_blocks(sizes, q, group_index), windows(k), windows(v), start)


def _join_windows(
    sizes: AttentionBlocks, x: Float[Array, "B g W H D"]
) -> Float[Array, "B W_row H D"]:
    """Adds windows where they overlap: the transpose of cutting a row into windows."""
    B, tail = x.shape[0], x.shape[3:]
    if sizes.blocks_per_group == 1:
        return x[:, 0]
    if not sizes.key_offset:
        return x.reshape(B, -1, *tail)
    zeros = jnp.zeros((B, 1, sizes.block_size, *tail), x.dtype)
    previous = jnp.concatenate([x[:, :, : sizes.key_offset], zeros], axis=1)
    own = jnp.concatenate([zeros, x[:, :, sizes.key_offset :]], axis=1)
    return (previous + own).reshape(B, -1, *tail)


def _write_overlapping(
    sizes: AttentionBlocks,
    group_index: Array | int,
    gradient: Array,
    overlap: Array,
    group_gradient: Array,
) -> tuple[Array, Array]:
    """Writes a group's gradient of keys or values, which overlaps with the next group's.

    Args:
      sizes: static sizes.
      group_index: which group.
      gradient: of the whole row.
      overlap: float32 sums of the previous group for this group's first `key_offset` keys.
      group_gradient: of this group's keys, float32.

    Returns:
      The gradient of the row, and the overlap for the next group.
    """
    group_gradient = group_gradient.at[:, : sizes.key_offset].add(overlap)
    begin = group_index * sizes.tokens_per_group
    # The last `key_offset` keys are incomplete here; the next group writes them again.
    gradient = jax.lax.dynamic_update_slice_in_dim(
        gradient, group_gradient.astype(gradient.dtype), begin, axis=1
    )
    return gradient, group_gradient[:, group_gradient.shape[1] - sizes.key_offset :]


def _interval_mask(
    sizes: AttentionBlocks, tile: _QueryTile, start: Array | None
) -> Bool[Array, "#B #g 1 Tq Tk"]:
    query = sizes.key_offset + jnp.arange(tile.queries.start, tile.queries.stop)[:, None]
    key = jnp.arange(tile.keys.start, tile.keys.stop)
    allowed = (key <= query)[None, None, None]
    if start is not None:
        allowed &= key >= start[:, :, None, tile.queries, None]
    return allowed


def _tile_scores(
    sizes: AttentionBlocks,
    tile: _QueryTile,
    group: _GroupOperands,
    dropout: AttentionDropout | None,
) -> tuple[Array, Array, Array | None]:
    """Scores, keys in the softmax, and factor on the weights, all (B, g, H, Tq, Tk)."""
    scores = jnp.einsum(
        "bgqhd,bgkhd->bghqk",
        group.q[:, :, tile.queries],
        group.k[:, :, tile.keys],
        precision=matmul_precision(group.q.dtype),
        preferred_element_type=accumulation_dtype(group.q.dtype),
    )
    allowed = _interval_mask(sizes, tile, group.start)
    dropout = _fold_in(dropout, tile.index)
    if dropout is None:
        return scores, allowed, None
    query = sizes.key_offset + jnp.arange(tile.queries.start, tile.queries.stop)[:, None]
    own = jnp.arange(tile.keys.start, tile.keys.stop) == query
    keep_mask, factor = dropout_masks(dropout, scores.shape, own)
    return scores, allowed if keep_mask is None else allowed & keep_mask, factor


def _attend_group(
    sizes: AttentionBlocks, group: _GroupOperands, dropout: AttentionDropout | None
) -> tuple[Float[Array, "B g S H Dv"], Float[Array, "B g H S"]]:
    outs, lses = [], []
    for tile in sizes.tiles():
        scores, allowed, factor = _tile_scores(sizes, tile, group, dropout)
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
        m_i = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(allowed, jnp.exp(scores - m_i), 0)
        l_i = jnp.sum(weights, axis=-1, keepdims=True)
        l_i = jnp.where(l_i > 0, l_i, 1)
        weights = weights / l_i if factor is None else weights / l_i * factor
        out = jnp.einsum(
            "bghqk,bgkhd->bgqhd",
            weights.astype(group.v.dtype),
            group.v[:, :, tile.keys],
            precision=matmul_precision(group.v.dtype),
            preferred_element_type=accumulation_dtype(group.v.dtype),
        )
        outs.append(out.astype(group.v.dtype))
        lses.append((m_i + jnp.log(l_i))[..., 0])
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=-1)


def _attend_group_backward(
    sizes: AttentionBlocks,
    group: _GroupOperands,
    lse: Float[Array, "B g H S"],
    do: Float[Array, "B g S H Dv"],
    dropout: AttentionDropout | None,
) -> tuple[Array, Array, Array]:
    """dq of the group's queries; dk and dv of the group's keys, in float32 at least."""
    q, k, v, _ = group
    wide, precision = accumulation_dtype(q.dtype), matmul_precision(q.dtype)
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)
    dqs, dk, dv = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    for tile in sizes.tiles():
        scores, allowed, factor = _tile_scores(sizes, tile, group, dropout)
        tile_lse = lse[..., tile.queries, None]
        weights = jnp.where(allowed, jnp.exp(scores - tile_lse), 0)
        tile_do = do[:, :, tile.queries]
        d_weights = einsum("bgqhd,bgkhd->bghqk", tile_do, v[:, :, tile.keys])
        dropped = weights
        if factor is not None:
            dropped, d_weights = weights * factor, d_weights * factor
        dv_tile = einsum("bghqk,bgqhd->bgkhd", dropped.astype(v.dtype), tile_do)
        dv = dv.at[:, :, tile.keys].add(dv_tile)
        # Products with another document may be infinite, and 0 times infinity is NaN: selections
        # exclude them from the row sum and from the gradient.
        d_weights = jnp.where(allowed, d_weights, 0)
        delta = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
        d_scores = jnp.where(allowed, weights * (d_weights - delta), 0).astype(q.dtype)
        dqs.append(einsum("bghqk,bgkhd->bgqhd", d_scores, k[:, :, tile.keys]).astype(q.dtype))
        dk_tile = einsum("bghqk,bgqhd->bgkhd", d_scores, q[:, :, tile.queries])
        dk = dk.at[:, :, tile.keys].add(dk_tile)
    dq = jnp.concatenate(dqs, axis=2)
    return dq, _join_windows(sizes, dk), _join_windows(sizes, dv)
