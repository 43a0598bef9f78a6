"""Chunk attention on Hopper: checks, padding to tiles, and the custom gradient."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.intervals import attend_intervals, pad_length
from pallas_kernels.chunk_attention.mosaic_gpu.band import TILE, AttentionGeometry, find_band
from pallas_kernels.chunk_attention.mosaic_gpu.launch import (
    band_product,
    make_unnormalized_weights,
    recompute_weights,
    score_gradient,
)
from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    ChunkAttentionOutput,
    KeyValueCache,
)
from pallas_kernels.common.mosaic_gpu import interpret_params
from pallas_kernels.common.residuals import name_residuals
from pallas_kernels.common.target import check_hopper

# Shorter rows were not timed against `xla`; one query, a decoding step, fills 1/128 of a tile.
SHORTEST_LENGTH = 512
# A tile of queries and two tiles of keys of this width fill shared memory.
_MAX_KEY_WIDTH = 256
# Head widths are padded to multiples of the first up to the second, above it to multiples of the
# second.
_NARROW, _WIDE = 64, 256


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
    """Attention by Pallas kernels for Hopper. Arguments as in `api.chunk_attention`.

    Raises:
      ValueError: operands that are not bfloat16, key heads wider than 256, dropout, or a device
        that is no Hopper GPU.
    """
    check_hopper("mosaic_gpu")
    obstacle = _find_obstacle(q, v, dropout)
    if obstacle is not None:
        raise ValueError(f"{obstacle}; use implementation 'xla'")
    if positions is None:
        B, L = q.shape[:2]
        index = jnp.arange(L, dtype=jnp.int32)
        starts = jnp.broadcast_to(index - index % chunk_size, (B, L))
        out = attend(q, k, v, starts, key_offset=0, chunk_size=chunk_size, starts_at_zero=True)
        return ChunkAttentionOutput(out, None)
    key_offset = 0 if cache is None else chunk_size
    return attend_intervals(
        partial(attend, key_offset=key_offset, chunk_size=chunk_size),
        q,
        k,
        v,
        chunk_size=chunk_size,
        positions=positions,
        segment_ids=segment_ids,
        cache=cache,
        key_offset=key_offset,
        zero_padding=True,
    )


def can_run(q: Array, v: Array, dropout: AttentionDropout | None) -> bool:
    """Whether a Hopper GPU can run the kernels on these operands."""
    return _find_obstacle(q, v, dropout) is None


def _find_obstacle(q: Array, v: Array, dropout: AttentionDropout | None) -> str | None:
    if q.dtype != jnp.bfloat16 or v.dtype != jnp.bfloat16:
        return f"mosaic_gpu multiplies bfloat16, q is {q.dtype} and v {v.dtype}"
    if q.shape[3] > _MAX_KEY_WIDTH:
        return f"mosaic_gpu takes key heads at most {_MAX_KEY_WIDTH} wide, q's are {q.shape[3]}"
    if dropout is not None and dropout.rate > 0:
        return "mosaic_gpu has no attention dropout"
    return None


def attend(
    q: Float[Array, "B L H Dk"],
    k: Float[Array, "B M H Dk"],
    v: Float[Array, "B M H Dv"],
    starts: Int32[Array, "B L"],
    *,
    key_offset: int,
    chunk_size: int,
    starts_at_zero: bool = False,
) -> Float[Array, "B L H Dv"]:
    """softmax(q kᵀ) v of every query t over keys starts[t] .. key_offset + t, M = key_offset + L.

    Args:
      q: queries, bfloat16.
      k: keys.
      v: values.
      starts: first key of every query, increasing along the row; past key_offset + t for a query
        that sees no key, whose output is 0.
      key_offset: keys before the first query's own.
      chunk_size: upper bound on the keys of a query.
      starts_at_zero: whether every row is one document from position 0.
    """
    length, value_width = q.shape[1], v.shape[3]
    before, after = -key_offset % TILE, -length % TILE
    q, k, v = (_pad_width(x) for x in (q, k, v))
    k, v = (pad_length(x, before, after) for x in (k, v))
    q = pad_length(q, 0, after)
    starts = jnp.pad(starts + before, ((0, 0), (0, after)), constant_values=k.shape[1])
    query_tiles = q.shape[1] // TILE
    geometry = AttentionGeometry(
        num_rows=q.shape[0],
        heads=q.shape[2],
        query_tiles=query_tiles,
        key_tile_offset=(key_offset + before) // TILE,
        max_key_tiles=min(-(-(chunk_size - 1) // TILE) + 1, k.shape[1] // TILE),
        tiles_per_chunk=min(-(-chunk_size // TILE), query_tiles),
        is_aligned=starts_at_zero and chunk_size % TILE == 0,
    )
    return _attend(geometry, interpret_params(), q, k, v, starts)[:, :length, :, :value_width]


def _pad_width(x: Float[Array, "B L H D"]) -> Float[Array, "B L H _"]:
    width = x.shape[-1]
    missing = -width % (_NARROW if width <= _WIDE else _WIDE)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    geometry: AttentionGeometry, interpret: Any, q: Array, k: Array, v: Array, starts: Array
) -> Array:
    return _attend_forward(geometry, interpret, q, k, v, starts)[0]


def _attend_forward(geometry, interpret, q, k, v, starts):
    band = find_band(starts, geometry)
    first = make_unnormalized_weights(band, q, k, geometry, interpret)
    out = band_product(
        band,
        first.weights,
        v,
        first.scale,
        geometry,
        interpret,
        repaired=(first.repaired_weights, first.is_repaired),
    )
    out, lse = name_residuals((out, first.lse), "chunk_attention")
    return out, (q, k, v, out, lse, band)


def _attend_backward(geometry, interpret, residuals, do):
    q, k, v, out, lse, band = residuals
    static = geometry, interpret
    weights = recompute_weights(band, q, k, lse, *static)
    dv = band_product(band, weights, do, None, *static, is_transposed=True)
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    ds = score_gradient(band, weights, do, v, jnp.swapaxes(delta, 1, 2), *static)
    dq = band_product(band, ds, k, None, *static)
    dk = band_product(band, ds, q, None, *static, is_transposed=True)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)
