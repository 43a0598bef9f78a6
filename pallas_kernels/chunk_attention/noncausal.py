"""Non-causal chunk attention in plain JAX: a token sees its document and chunk on both sides.

Queries form units, each with the keys in its reach: a chunk and its own keys where chunks begin
with the blocks of a row, a block and the keys of three blocks where they begin with documents, a
whole row without chunks. A token has a code, and a query sees the keys of its unit with its own
code. Groups of units, and tiles of queries in a unit, keep the scores under a fixed size; the
backward pass recomputes them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.chunk_attention.context_parallel import KeysInReach
from pallas_kernels.chunk_attention.intervals import pad_length
from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    accumulation_dtype,
    dropout_masks,
    matmul_precision,
)
from pallas_kernels.common.residuals import name_residuals

# Scores that exist at a time: 256 MiB of float32.
_MAX_SCORES = 1 << 26
_TILE_MULTIPLE = 128


class _Units(NamedTuple):
    """U units of S queries, each with W keys.

    Attributes:
      q: queries.
      k: keys.
      v: values.
      q_codes: codes of the queries, 0: sees no key; None: every query sees every key of its unit.
      k_codes: codes of the keys; None as `q_codes`.
      own: index of the key that belongs to a unit's first query.
    """

    q: Float[Array, "U S H Dk"]
    k: Float[Array, "U W H Dk"]
    v: Float[Array, "U W H Dv"]
    q_codes: Int32[Array, "U S"] | None
    k_codes: Int32[Array, "U W"] | None
    own: Int32[Array, ""]


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Static sizes: units computed in one step, and queries of a tile."""

    units_per_group: int
    tile_size: int

    @classmethod
    def make(cls, units: _Units) -> Self:
        U, S, H, _ = units.q.shape
        row = H * units.k.shape[1]
        tile = S
        if S * row > _MAX_SCORES:
            tile = max(1, _MAX_SCORES // row // _TILE_MULTIPLE) * _TILE_MULTIPLE
        most = max(1, _MAX_SCORES // (min(tile, S) * row))
        group = max(size for size in range(1, min(most, U) + 1) if U % size == 0)
        return cls(group, min(tile, S))


def noncausal_attention(
    q: Float[Array, "B L H Dk"],
    keys: KeysInReach,
    chunk_size: int | None,
    positions: Int32[Array, "B L"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    dropout: AttentionDropout | None,
) -> Float[Array, "B L H Dv"]:
    """Blocked attention; arguments as in `reference.noncausal_attention`."""
    if dropout is not None and dropout.rate == 0:
        dropout = None
    B, L = q.shape[:2]
    if chunk_size is None:
        units = _Units(
            q, keys.key, keys.value, segment_ids, keys.segment_ids, jnp.asarray(keys.num_before)
        )
    elif positions is None:
        units = _aligned_units(q, keys, min(chunk_size, L), segment_ids)
    else:
        units = _window_units(q, keys, chunk_size, positions, segment_ids)
    out = _attend(_Sizes.make(units), units, dropout)
    return out.reshape(B, -1, *out.shape[2:])[:, :L]


def _aligned_units(
    q: Array, keys: KeysInReach, chunk_size: int, segment_ids: Array | None
) -> _Units:
    """Chunks that begin at multiples of their size in the row."""
    after = -q.shape[1] % chunk_size
    if after and segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    codes = None if segment_ids is None else _blocks(_pad_codes(segment_ids, 0, after), chunk_size)
    q, k, v = (_blocks(pad_length(x, 0, after), chunk_size) for x in (q, keys.key, keys.value))
    return _Units(q, k, v, codes, codes, jnp.zeros((), jnp.int32))


def _window_units(
    q: Array,
    keys: KeysInReach,
    chunk_size: int,
    positions: Array,
    segment_ids: Array | None,
) -> _Units:
    """Chunks that begin with documents: a block of C queries and the 3C keys around it."""
    C, (B, L) = chunk_size, q.shape[:2]
    if keys.positions is None:
        raise ValueError("keys of chunks that begin with documents have no positions")
    # The key of the first query; a number, because chunks reach as far on every device.
    before = keys.num_before
    assert isinstance(before, int)
    q_codes = _chunk_codes(positions % C, segment_ids, 0)
    k_codes = _chunk_codes(keys.positions % C, keys.segment_ids, before)
    after = -L % C
    q = _blocks(pad_length(q, 0, after), C)
    q_codes = _blocks(_pad_codes(q_codes, 0, after), C)
    left, right = C - before, C + after - (keys.key.shape[1] - before - L)

    def windows(x: Array) -> Array:
        blocks = x.reshape(B, -1, C, *x.shape[2:])
        joined = jnp.concatenate([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], axis=2)
        return joined.reshape(-1, 3 * C, *x.shape[2:])

    k, v = (windows(pad_length(x, left, right)) for x in (keys.key, keys.value))
    k_codes = windows(_pad_codes(k_codes, left, right))
    return _Units(q, k, v, q_codes, k_codes, jnp.asarray(C, jnp.int32))


def _chunk_codes(
    in_chunk: Int32[Array, "B S"], segment_ids: Int32[Array, "B S"] | None, num_before: int
) -> Int32[Array, "B S"]:
    """The column of the first token of every token's chunk, above 0; 0 for padding.

    Chunks are contiguous, so the column tells them apart.

    Args:
      in_chunk: positions of the tokens in their chunks.
      segment_ids: 0 for padding; None: no padding.
      num_before: tokens before the first query.
    """
    columns = jnp.arange(in_chunk.shape[1], dtype=jnp.int32) - num_before
    # A chunk in reach begins at most 2^29 tokens before the first query.
    codes = columns - in_chunk + (1 << 29)
    return codes if segment_ids is None else jnp.where(segment_ids != 0, codes, 0)


def _pad_codes(codes: Array, before: int, after: int) -> Array:
    return jnp.pad(codes, ((0, 0), (before, after)))


def _blocks(x: Array, size: int) -> Array:
    """(B, L, ...) in blocks (B * L / size, size, ...)."""
    return x.reshape(-1, size, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sizes: _Sizes, units: _Units, dropout: AttentionDropout | None) -> Array:
    return _attend_forward(sizes, units, dropout)[0]


def _attend_forward(sizes: _Sizes, units: _Units, dropout: AttentionDropout | None):
    def attend_group(index: Array, group: _Units) -> tuple[Array, Array]:
        def attend_tile(tile: Array, q: Array, q_codes: Array | None) -> tuple[Array, Array]:
            part = group._replace(q=q, q_codes=q_codes)
            return _attend_tile(part, tile * sizes.tile_size, _fold_in(dropout, index, tile))

        out, lse = _over_tiles(sizes, attend_tile, group.q, group.q_codes)
        return _join_tiles(out, 1), _join_tiles(lse, 2)

    out, lse = _over_groups(sizes, attend_group, units)
    length = units.q.shape[1]
    out, lse = name_residuals((out[:, :length], lse), "chunk_attention")
    return out, (units, dropout, lse)


def _attend_backward(sizes: _Sizes, residuals: Any, do: Array):
    units, dropout, lse = residuals
    wide = accumulation_dtype(units.q.dtype)

    def of_group(index: Array, group: tuple[_Units, Array, Array]) -> tuple[Array, Array, Array]:
        own, do, lse = group
        zeros = jnp.zeros(own.k.shape, wide), jnp.zeros(own.v.shape, wide)

        def of_tile(tile: Array, q: Array, q_codes: Array | None, do: Array, lse: Array):
            part = own._replace(q=q, q_codes=q_codes)
            key = _fold_in(dropout, index, tile)
            return _tile_gradients(part, do, lse, tile * sizes.tile_size, key)

        tiles = _split_tiles(sizes, own.q, own.q_codes, do), _split_lse(sizes, lse)
        if (count := lse.shape[2] // sizes.tile_size) == 1:
            (q, q_codes, do), lse = jax.tree.map(lambda x: x[0], tiles)
            return of_tile(jnp.zeros((), jnp.int32), q, q_codes, do, lse)

        def add(total: tuple[Array, Array], entry: Any):
            tile, ((q, q_codes, do), lse) = entry
            dq, dk, dv = of_tile(tile, q, q_codes, do, lse)
            return (total[0] + dk, total[1] + dv), dq

        (dk, dv), dq = jax.lax.scan(add, zeros, (jnp.arange(count, dtype=jnp.int32), tiles))
        return _join_tiles(dq, 1), dk, dv

    dq, dk, dv = _over_groups(sizes, of_group, (units, do, lse))
    gradients = units._replace(
        q=dq[:, : units.q.shape[1]].astype(units.q.dtype),
        k=dk.astype(units.k.dtype),
        v=dv.astype(units.v.dtype),
        q_codes=None,
        k_codes=None,
        own=None,
    )
    return gradients, None


_attend.defvjp(_attend_forward, _attend_backward)


def _over_groups(sizes: _Sizes, function: Any, tree: Any) -> Any:
    """`function(index, group)` of every group of units, with the units of its results joined."""
    count = jax.tree.leaves(tree)[0].shape[0] // sizes.units_per_group
    if count == 1:
        return function(jnp.zeros((), jnp.int32), tree)

    def split(x: Array) -> Array:
        # A constant residual of rematerialized code is a number without `ndim`.
        if jnp.ndim(x) == 0:
            return jnp.broadcast_to(x, (count,))
        return x.reshape(count, sizes.units_per_group, *x.shape[1:])

    indices = jnp.arange(count, dtype=jnp.int32)
    results = jax.lax.map(lambda entry: function(*entry), (indices, jax.tree.map(split, tree)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _over_tiles(sizes: _Sizes, function: Any, *operands: Array | None) -> Any:
    tiles = _split_tiles(sizes, *operands)
    count = jax.tree.leaves(tiles)[0].shape[0]
    if count == 1:
        first = jax.tree.map(lambda x: x[0], tiles)
        return jax.tree.map(lambda x: x[None], function(jnp.zeros((), jnp.int32), *first))
    indices = jnp.arange(count, dtype=jnp.int32)
    return jax.lax.map(lambda entry: function(entry[0], *entry[1]), (indices, tiles))


def _split_tiles(sizes: _Sizes, *operands: Array | None) -> tuple[Array | None, ...]:
    """(u, S, ...) in tiles (T, u, tile, ...), padded with zeros."""

    def split(x: Array) -> Array:
        after = -x.shape[1] % sizes.tile_size
        x = jnp.pad(x, ((0, 0), (0, after), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, sizes.tile_size, *x.shape[2:]), 1, 0)

    return tuple(None if x is None else split(x) for x in operands)


def _split_lse(sizes: _Sizes, lse: Float[Array, "u H S"]) -> Array:
    return jnp.moveaxis(lse.reshape(*lse.shape[:2], -1, sizes.tile_size), 2, 0)


def _join_tiles(x: Array, axis: int) -> Array:
    """(T, ...) with tiles joined along `axis` of one of them."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _fold_in(dropout: AttentionDropout | None, *numbers: Array) -> AttentionDropout | None:
    if dropout is None:
        return None
    key = functools.reduce(jax.random.fold_in, numbers, dropout.key)
    return dataclasses.replace(dropout, key=key)


def _tile_scores(
    part: _Units, first_query: Array, dropout: AttentionDropout | None
) -> tuple[Array, Bool[Array, "#u 1 #Tq #W"], Array | None]:
    """Scores, keys in the softmax, and factor on the weights, all (u, H, Tq, W)."""
    scores = jnp.einsum(
        "uqhd,uwhd->uhqw",
        part.q,
        part.k,
        precision=matmul_precision(part.q.dtype),
        preferred_element_type=accumulation_dtype(part.q.dtype),
    )
    allowed = jnp.ones((1, 1, 1, 1), bool)
    if part.q_codes is not None and part.k_codes is not None:
        query, key = part.q_codes[:, None, :, None], part.k_codes[:, None, None, :]
        allowed = (query == key) & (query != 0)
    if dropout is None:
        return scores, allowed, None
    query = part.own + first_query + jnp.arange(scores.shape[2])
    own = query[:, None] == jnp.arange(scores.shape[3])
    keep_mask, factor = dropout_masks(dropout, scores.shape, own)
    return scores, allowed if keep_mask is None else allowed & keep_mask, factor


def _attend_tile(
    part: _Units, first_query: Array, dropout: AttentionDropout | None
) -> tuple[Float[Array, "u Tq H Dv"], Float[Array, "u H Tq"]]:
    scores, allowed, factor = _tile_scores(part, first_query, dropout)
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    m_i = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(scores - m_i), 0)
    l_i = jnp.sum(weights, axis=-1, keepdims=True)
    l_i = jnp.where(l_i > 0, l_i, 1)
    weights = weights / l_i if factor is None else weights / l_i * factor
    out = jnp.einsum(
        "uhqw,uwhd->uqhd",
        weights.astype(part.v.dtype),
        part.v,
        precision=matmul_precision(part.v.dtype),
        preferred_element_type=accumulation_dtype(part.v.dtype),
    )
    return out.astype(part.v.dtype), (m_i + jnp.log(l_i))[..., 0]


def _tile_gradients(
    part: _Units,
    do: Float[Array, "u Tq H Dv"],
    lse: Float[Array, "u H Tq"],
    first_query: Array,
    dropout: AttentionDropout | None,
) -> tuple[Array, Array, Array]:
    """dq of the tile; its terms of dk and dv, in float32 at least."""
    q, k, v = part.q, part.k, part.v
    wide, precision = accumulation_dtype(q.dtype), matmul_precision(q.dtype)
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)
    scores, allowed, factor = _tile_scores(part, first_query, dropout)
    weights = jnp.where(allowed, jnp.exp(scores - lse[..., None]), 0)
    d_weights = einsum("uqhd,uwhd->uhqw", do, v)
    dropped = weights
    if factor is not None:
        dropped, d_weights = weights * factor, d_weights * factor
    dv = einsum("uhqw,uqhd->uwhd", dropped.astype(v.dtype), do)
    # 0 times infinity is NaN: selections keep products with other documents out.
    d_weights = jnp.where(allowed, d_weights, 0)
    delta = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_scores = jnp.where(allowed, weights * (d_weights - delta), 0).astype(q.dtype)
    dq = einsum("uhqw,uwhd->uqhd", d_scores, k)
    return dq, einsum("uhqw,uqhd->uwhd", d_scores, q), dv
