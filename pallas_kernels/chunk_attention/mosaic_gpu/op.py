"""Chunk attention on Hopper: what surrounds `mosaic_gpu_weights` and `mosaic_gpu_products`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.intervals import align_right, interval_starts, next_cache
from pallas_kernels.chunk_attention.mosaic_gpu.band import TILE, Geometry, find_band
from pallas_kernels.chunk_attention.mosaic_gpu.products import band_product, score_gradient
from pallas_kernels.chunk_attention.mosaic_gpu.weights import make_first_weights, make_weights
from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    ChunkAttentionOutput,
    KeyValueCache,
)
from pallas_kernels.common.residuals import name_residuals
from pallas_kernels.common.target import check_hopper, is_interpreted

# Shorter rows were not timed against `xla`; one query, a decoding step, fills 1/128 of a tile.
SHORTEST_LENGTH = 512
# A tile of queries and two of keys of this width fill shared memory.
_WIDEST_KEY = 256
# Widths of heads that the kernels' tiles are made for: multiples of the first, above the second
# multiples of the second. Others are padded in a copy.
_NARROW, _WIDE = 64, 256


class _Options(NamedTuple):
    width: int
    left: int
    period: int
    is_regular: bool
    interpret: Any


def chunk_attention(
    q: Float[Array, "B L H Dk"],
    k: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    chunk_size: int,
    positions: Int32[Array, "B L"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    cache: KeyValueCache | None,
    dropout: AttentionDropout | None,
) -> ChunkAttentionOutput:
    """The kernels; arguments as in `api.chunk_attention`.

    Raises:
      ValueError: operands that are not bfloat16, key heads wider than 256, dropout, or a device
        that is no Hopper GPU.
    """
    _check(q, v, dropout)
    B, L = q.shape[:2]
    index = jnp.arange(L, dtype=jnp.int32)
    if positions is None:
        starts = jnp.broadcast_to(index - index % chunk_size, (B, L))
        out = attend(q, k, v, starts, left=0, chunk_size=chunk_size, is_from_zero=True)
        return ChunkAttentionOutput(out, None)
    left = 0 if cache is None else chunk_size
    held = jnp.zeros((B, 1), jnp.int32) if cache is None else positions[:, :1] % chunk_size
    starts = interval_starts(positions, segment_ids, chunk_size, left, held)
    if segment_ids is not None:
        # A weight of zero does not undo what padding may hold, a NaN for instance.
        is_token = (segment_ids != 0)[:, :, None, None]
        q, k, v = (jnp.where(is_token, a, 0) for a in (q, k, v))
    k_row, v_row = k, v
    if cache is not None:
        k_row = jnp.concatenate([align_right(cache.key, held), k], axis=1)
        v_row = jnp.concatenate([align_right(cache.value, held), v], axis=1)
    out = attend(q, k_row, v_row, starts, left=left, chunk_size=chunk_size)
    if segment_ids is not None:
        out = jnp.where(is_token, out, 0)
    if cache is not None:
        cache = next_cache(k_row, v_row, chunk_size, positions, segment_ids, cache)
    return ChunkAttentionOutput(out, cache)


def can_run(q: Array, v: Array, dropout: AttentionDropout | None) -> bool:
    """Whether the kernels compute this on a GPU that they are made for."""
    return _find_reason_against(q, v, dropout) is None


def _check(q: Array, v: Array, dropout: AttentionDropout | None) -> None:
    check_hopper("mosaic_gpu")
    reason = _find_reason_against(q, v, dropout)
    if reason is not None:
        raise ValueError(f"{reason}; use implementation 'xla'")


def _find_reason_against(q: Array, v: Array, dropout: AttentionDropout | None) -> str | None:
    if q.dtype != jnp.bfloat16 or v.dtype != jnp.bfloat16:
        return f"mosaic_gpu multiplies bfloat16, q is {q.dtype} and v {v.dtype}"
    if q.shape[3] > _WIDEST_KEY:
        return f"mosaic_gpu takes key heads at most {_WIDEST_KEY} wide, q's are {q.shape[3]}"
    if dropout is not None and dropout.rate > 0:
        return "mosaic_gpu has no attention dropout"
    return None


def _pad_width(a: Array) -> Array:
    width = a.shape[-1]
    missing = -width % (_NARROW if width <= _WIDE else _WIDE)
    return jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else a


def attend(
    q: Float[Array, "B L H Dk"],
    k: Float[Array, "B M H Dk"],
    v: Float[Array, "B M H Dv"],
    starts: Int32[Array, "B L"],
    *,
    left: int,
    chunk_size: int,
    is_from_zero: bool = False,
) -> Float[Array, "B L H Dv"]:
    """softmax(q kᵀ) v of every query t over keys starts[t] .. left + t, M = left + L.

    Args:
      q: queries, bfloat16.
      k: keys, `left` of them before the first query's own.
      v: values.
      starts: first key of every query, never less than that of a query before; beyond left + t
        for a query that sees nothing and gives 0.
      left: keys before the first query's own.
      chunk_size: no query sees more keys.
      is_from_zero: whether rows are one document that starts at position 0.
    """
    length, value_width, extra = q.shape[1], v.shape[3], -left % TILE
    q, k, v = (_pad_width(a) for a in (q, k, v))
    missing = -length % TILE
    k, v = (jnp.pad(a, ((0, 0), (extra, missing), (0, 0), (0, 0))) for a in (k, v))
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0)))
    starts = jnp.pad(starts + extra, ((0, 0), (0, missing)), constant_values=k.shape[1])
    tiles = -(-(chunk_size - 1) // TILE) + 1
    width = min(tiles, k.shape[1] // TILE)
    interpret = plgpu.InterpretGPUParams() if is_interpreted() else None
    is_regular = is_from_zero and chunk_size % TILE == 0
    options = _Options(width, left + extra, -(-chunk_size // TILE), is_regular, interpret)
    return _attend(options, q, k, v, starts)[:, :length, :, :value_width]


def _geometry(options: _Options, q: Array) -> Geometry:
    rows, length, heads, _ = q.shape
    query_tiles = length // TILE
    return Geometry(
        rows=rows,
        heads=heads,
        query_tiles=query_tiles,
        offset=options.left // TILE,
        width=options.width,
        period=min(options.period, query_tiles),
        is_regular=options.is_regular,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q: Array, k: Array, v: Array, starts: Array) -> Array:
    return _attend_forward(options, q, k, v, starts)[0]


def _attend_forward(options, q, k, v, starts):
    geometry = _geometry(options, q)
    band = find_band(starts, geometry)
    first = make_first_weights(band, q, k, geometry, options.interpret)
    repaired = first.repaired, first.is_repaired
    out = band_product(
        band, first.weights, v, first.scale, geometry, options.interpret, repaired=repaired
    )
    out, lse = name_residuals((out, first.lse), "chunk_attention")
    return out, (q, k, v, out, lse, band)


def _attend_backward(options, kept, do):
    q, k, v, out, lse, band = kept
    geometry = _geometry(options, q)
    arguments = geometry, options.interpret
    weights = make_weights(band, q, k, lse, *arguments)
    dv = band_product(band, weights, do, None, *arguments, is_transposed=True)
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    ds = score_gradient(band, weights, do, v, jnp.swapaxes(delta, 1, 2), *arguments)
    dq = band_product(band, ds, k, None, *arguments)
    dk = band_product(band, ds, q, None, *arguments, is_transposed=True)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)
