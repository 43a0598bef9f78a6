"""Blocked interval attention with a recomputing backward pass: the core of the XLA implementation.

Queries come in `blocks` blocks; block j sees the keys of its own tokens and of `left` tokens before
them. Inside a block, tiles of queries skip the keys no query of the tile can reach, so causal work
is saved without data-dependent shapes. Blocks run in groups whose scores stay under a fixed size.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    accumulation_dtype,
    dropout_masks,
    matmul_precision,
)
from pallas_kernels.common.residuals import name_residuals

# Scores of one tile of all blocks of a group, in numbers: 256 MiB of float32.
_LARGEST_SCORES = 1 << 26


class _Tile(NamedTuple):
    number: int
    queries: slice
    keys: slice


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Static sizes of one call.

    Attributes:
      chunk_size: tokens C in a chunk; no query reaches a key C or more tokens before it.
      left: keys before the first query (0 or C).
      block: queries in a block; C if there is more than one block.
      blocks: blocks in a row.
      group: blocks computed together; divides `blocks`.
      tile: queries in a tile.
    """

    chunk_size: int
    left: int
    block: int
    blocks: int
    group: int
    tile: int

    @classmethod
    def make(cls, q_shape: tuple[int, ...], chunk_size: int, left: int) -> Self:
        """Sizes for queries of shape (B, L, H, Dk)."""
        B, L, H, _ = q_shape
        block = min(chunk_size, L)
        blocks = -(-L // block)
        # 8 tiles do 9/16 of a dense chunk's work (the least is 1/2); tiles under 128 cost time.
        tile = min(block, max(128, -(-block // 8)))
        scores = B * H * tile * (left + block)
        largest = max(1, _LARGEST_SCORES // scores)
        group = max(size for size in range(1, min(blocks, largest) + 1) if blocks % size == 0)
        return cls(chunk_size, left, block, blocks, group, tile)

    @property
    def length(self) -> int:
        """Queries in a row, padding included."""
        return self.block * self.blocks

    def tiles(self) -> Iterator[_Tile]:
        """Tiles of a block: which queries, and which keys of the window they may reach."""
        for number, begin in enumerate(range(0, self.block, self.tile)):
            end = min(begin + self.tile, self.block)
            first_key = max(0, self.left + begin - self.chunk_size + 1)
            yield _Tile(number, slice(begin, end), slice(first_key, self.left + end))


class _Operands(NamedTuple):
    """One group: g blocks of S queries, W = left + S keys each."""

    q: Float[Array, "B g S H Dk"]
    k: Float[Array, "B g W H Dk"]
    v: Float[Array, "B g W H Dv"]
    start: Int32[Array, "B g S"] | None


def attend_blocks(
    plan: BlockPlan,
    q: Float[Array, "B Lq H Dk"],
    k: Float[Array, "B Lk H Dk"],
    v: Float[Array, "B Lk H Dv"],
    start: Int32[Array, "B Lq"] | None,
    dropout: AttentionDropout | None,
) -> Float[Array, "B Lq H Dv"]:
    """Attention of query i to keys start[i] .. left + i; an empty interval gives 0.

    Args:
      plan: static sizes; Lq = plan.length, Lk = plan.left + plan.length.
      q: queries.
      k: keys.
      v: values.
      start: index into the keys; None: the first key of the query's block.
      dropout: drops attention at random.
    """
    return _attend(plan, q, k, v, start, dropout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, start, dropout):
    return _attend_forward(plan, q, k, v, start, dropout)[0]


def _attend_forward(plan: BlockPlan, q, k, v, start, dropout):
    B, H = q.shape[0], q.shape[2]
    step = plan.group * plan.block

    def body(number: Array | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = carry
        group_out, group_lse = _attend_group(
            plan, _take_group(plan, number, q, k, v, start), _fold(dropout, number)
        )
        out = jax.lax.dynamic_update_slice_in_dim(
            out, group_out.reshape(B, step, *out.shape[2:]), number * step, axis=1
        )
        lse = jax.lax.dynamic_update_slice_in_dim(lse, group_lse, number * plan.group, axis=1)
        return out, lse

    carry = (
        jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype),
        jnp.zeros((B, plan.blocks, H, plan.block), accumulation_dtype(q.dtype)),
    )
    out, lse = name_residuals(_for_each_group(plan, body, carry), "chunk_attention")
    return out, (q, k, v, start, dropout, lse)


def _attend_backward(plan: BlockPlan, residuals, d_out):
    q, k, v, start, dropout, lse = residuals
    B, step = q.shape[0], plan.group * plan.block

    def body(number: Array | int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        dq, dk, dv, dk_left, dv_left = carry
        group_lse = jax.lax.dynamic_slice_in_dim(lse, number * plan.group, plan.group, axis=1)
        group_dq, dk_row, dv_row = _differentiate_group(
            plan,
            _take_group(plan, number, q, k, v, start),
            group_lse,
            _split_blocks(plan, d_out, number),
            _fold(dropout, number),
        )
        dk, dk_left = _write_overlapping(plan, number, dk, dk_left, dk_row)
        dv, dv_left = _write_overlapping(plan, number, dv, dv_left, dv_row)
        dq = jax.lax.dynamic_update_slice_in_dim(
            dq, group_dq.reshape(B, step, *dq.shape[2:]), number * step, axis=1
        )
        return dq, dk, dv, dk_left, dv_left

    wide = accumulation_dtype(q.dtype)
    carry = (
        *(jnp.zeros_like(x) for x in (q, k, v)),
        *(jnp.zeros((B, plan.left, *x.shape[2:]), wide) for x in (k, v)),
    )
    dq, dk, dv, _, _ = _for_each_group(plan, body, carry)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _for_each_group(plan: BlockPlan, body, carry):
    groups = plan.blocks // plan.group
    return body(0, carry) if groups == 1 else jax.lax.fori_loop(0, groups, body, carry)


def _fold(dropout: AttentionDropout | None, number: Array | int) -> AttentionDropout | None:
    if dropout is None:
        return None
    return dataclasses.replace(dropout, key=jax.random.fold_in(dropout.key, number))


def _split_blocks(plan: BlockPlan, x: Array, number: Array | int) -> Array:
    step = plan.group * plan.block
    x = jax.lax.dynamic_slice_in_dim(x, number * step, step, axis=1)
    return x.reshape(x.shape[0], plan.group, plan.block, *x.shape[2:])


def _take_group(plan: BlockPlan, number: Array | int, q, k, v, start) -> _Operands:
    step = plan.group * plan.block
    if start is not None:
        # From indices of the row to indices of the block's window.
        block = number * plan.group + jnp.arange(plan.group, dtype=jnp.int32)
        start = _split_blocks(plan, start, number) - plan.block * block[:, None]

    def windows(x: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(x, number * step, plan.left + step, axis=1)
        if plan.group == 1:
            return row[:, None]
        blocks = row.reshape(row.shape[0], -1, plan.block, *row.shape[2:])
        if not plan.left:
            return blocks
        return jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=2)

    return _Operands(_split_blocks(plan, q, number), windows(k), windows(v), start)


def _join_windows(plan: BlockPlan, x: Float[Array, "B g W H D"]) -> Float[Array, "B W_row H D"]:
    """Adds windows where they overlap: the transpose of cutting a row into windows."""
    B, tail = x.shape[0], x.shape[3:]
    if plan.group == 1:
        return x[:, 0]
    if not plan.left:
        return x.reshape(B, -1, *tail)
    none = jnp.zeros((B, 1, plan.block, *tail), x.dtype)
    before = jnp.concatenate([x[:, :, : plan.left], none], axis=1)
    own = jnp.concatenate([none, x[:, :, plan.left :]], axis=1)
    return (before + own).reshape(B, -1, *tail)


def _write_overlapping(
    plan: BlockPlan, number: Array | int, total: Array, left: Array, row: Array
) -> tuple[Array, Array]:
    """Writes a group's gradient; its first `left` keys also got `left` from the group before."""
    row = row.at[:, : plan.left].add(left)
    begin = number * plan.group * plan.block
    # The last `left` keys are written unfinished and written again by the next group.
    total = jax.lax.dynamic_update_slice_in_dim(total, row.astype(total.dtype), begin, axis=1)
    return total, row[:, row.shape[1] - plan.left :]


def _reachable(plan: BlockPlan, tile: _Tile, start: Array | None) -> Bool[Array, "#B #g 1 Tq Tk"]:
    query = plan.left + jnp.arange(tile.queries.start, tile.queries.stop)[:, None]
    key = jnp.arange(tile.keys.start, tile.keys.stop)
    allowed = (key <= query)[None, None, None]
    if start is not None:
        allowed &= key >= start[:, :, None, tile.queries, None]
    return allowed


def _tile_scores(
    plan: BlockPlan, tile: _Tile, group: _Operands, dropout: AttentionDropout | None
) -> tuple[Array, Array, Array | None]:
    """Scores, keys in the softmax, and factor on the weights, all (B, g, H, Tq, Tk)."""
    scores = jnp.einsum(
        "bgqhd,bgkhd->bghqk",
        group.q[:, :, tile.queries],
        group.k[:, :, tile.keys],
        precision=matmul_precision(group.q.dtype),
        preferred_element_type=accumulation_dtype(group.q.dtype),
    )
    allowed = _reachable(plan, tile, group.start)
    dropout = _fold(dropout, tile.number)
    if dropout is None:
        return scores, allowed, None
    query = plan.left + jnp.arange(tile.queries.start, tile.queries.stop)[:, None]
    own = jnp.arange(tile.keys.start, tile.keys.stop) == query
    kept, factor = dropout_masks(dropout, scores.shape, own)
    return scores, allowed if kept is None else allowed & kept, factor


def _attend_group(
    plan: BlockPlan, group: _Operands, dropout: AttentionDropout | None
) -> tuple[Float[Array, "B g S H Dv"], Float[Array, "B g H S"]]:
    outs, lses = [], []
    for tile in plan.tiles():
        scores, allowed, factor = _tile_scores(plan, tile, group, dropout)
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(allowed, jnp.exp(scores - largest), 0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total > 0, total, 1)
        weights = weights / total if factor is None else weights / total * factor
        out = jnp.einsum(
            "bghqk,bgkhd->bgqhd",
            weights.astype(group.v.dtype),
            group.v[:, :, tile.keys],
            precision=matmul_precision(group.v.dtype),
            preferred_element_type=accumulation_dtype(group.v.dtype),
        )
        outs.append(out.astype(group.v.dtype))
        lses.append((largest + jnp.log(total))[..., 0])
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=-1)


def _differentiate_group(
    plan: BlockPlan,
    group: _Operands,
    lse: Float[Array, "B g H S"],
    d_out: Float[Array, "B g S H Dv"],
    dropout: AttentionDropout | None,
) -> tuple[Array, Array, Array]:
    """dq of the group's queries; dk, dv (wide) of the group's row of keys."""
    q, k, v, _ = group
    wide, precision = accumulation_dtype(q.dtype), matmul_precision(q.dtype)
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)
    dqs, dk, dv = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    for tile in plan.tiles():
        scores, allowed, factor = _tile_scores(plan, tile, group, dropout)
        tile_lse = lse[..., tile.queries, None]
        weights = jnp.where(allowed, jnp.exp(scores - tile_lse), 0)
        tile_d_out = d_out[:, :, tile.queries]
        d_weights = einsum("bgqhd,bgkhd->bghqk", tile_d_out, v[:, :, tile.keys])
        dropped = weights
        if factor is not None:
            dropped, d_weights = weights * factor, d_weights * factor
        dv_tile = einsum("bghqk,bgqhd->bgkhd", dropped.astype(v.dtype), tile_d_out)
        dv = dv.at[:, :, tile.keys].add(dv_tile)
        # Another document may hold numbers so large that its products are infinite, and 0 times
        # infinity is a NaN: both pairs of documents and rows of the other one are selected away.
        d_weights = jnp.where(allowed, d_weights, 0)
        mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
        d_scores = jnp.where(allowed, weights * (d_weights - mean), 0).astype(q.dtype)
        dqs.append(einsum("bghqk,bgkhd->bgqhd", d_scores, k[:, :, tile.keys]).astype(q.dtype))
        dk_tile = einsum("bghqk,bgqhd->bgkhd", d_scores, q[:, :, tile.queries])
        dk = dk.at[:, :, tile.keys].add(dk_tile)
    dq = jnp.concatenate(dqs, axis=2)
    return dq, _join_windows(plan, dk), _join_windows(plan, dv)
