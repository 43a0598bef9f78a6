"""Launches of the attention kernels: operands, result shapes, grids."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.triton.block_sizes import AttentionTiles, Pass, choose_tiles
from pallas_kernels.common import triton
from pallas_kernels.common.target import find_target

MODULE = "pallas_kernels.chunk_attention.triton.kernels"


class Intervals(NamedTuple):
    """The keys that every query sees: start[t] up to stop[t] - 1; none if start[t] >= stop[t].

    Both grow along the row, apart from queries that see no key.

    Attributes:
      start: first key.
      stop: key after the last one.
    """

    start: Int32[Array, "B L"]
    stop: Int32[Array, "B L"]


class Operands(NamedTuple):
    """One call's inputs.

    Attributes:
      q: queries.
      k: keys.
      v: values.
      intervals: what the queries see.
    """

    q: Float[Array, "B L H Dk"]
    k: Float[Array, "B M H Dk"]
    v: Float[Array, "B M H Dv"]
    intervals: Intervals


class OutputGradient(NamedTuple):
    """Inputs of the backward kernels, from the forward pass and from above.

    Attributes:
      do: gradient of the output.
      lse: logarithm of every query's sum of exponentials, 0 without keys.
      delta: rowsum(dO * O) of every query.
    """

    do: Float[Array, "B L H Dv"]
    lse: Float[Array, "B H L"]
    delta: Float[Array, "B H L"]


def launch_forward(operands: Operands, *, interpret: bool) -> tuple[Array, Array]:
    """The output (B, L, H, Dv) in v's dtype, and lse (B, H, L).

    One kernel if all columns of a value fit into a tile; else one for lse and one for the output.
    """
    q, k, v, intervals = operands
    B, L, H, _ = q.shape
    lengths = [L, k.shape[1]]
    tiles = _tiles(operands, "forward")
    out_type = jax.ShapeDtypeStruct((B, L, H, v.shape[3]), v.dtype)
    out, lse = _launch(
        "forward",
        [q, k, v, *intervals, *lengths],
        [
            out_type if tiles.is_narrow else jax.ShapeDtypeStruct((1,), v.dtype),
            jax.ShapeDtypeStruct((B, H, L), jnp.float32),
        ],
        (B * H * -(-L // tiles.queries),),
        operands,
        tiles,
        interpret,
    )
    if tiles.is_narrow:
        return out, lse
    tiles = _tiles(operands, "output")
    (out,) = _launch(
        "output",
        [q, k, v, lse, *intervals, *lengths],
        [out_type],
        (B * H * -(-L // tiles.queries), -(-v.shape[3] // tiles.value_block)),
        operands,
        tiles,
        interpret,
    )
    return out, lse


def launch_query_gradient(
    operands: Operands, gradient: OutputGradient, *, interpret: bool
) -> Array:
    """DQ in q's shape and dtype."""
    q, k, v, intervals = operands
    B, L, H, _ = q.shape
    tiles = _tiles(operands, "query_gradient")
    (dq,) = _launch(
        "query_gradient",
        [q, k, v, *gradient, *intervals, L, k.shape[1]],
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        (B * H * -(-L // tiles.queries),),
        operands,
        tiles,
        interpret,
    )
    return dq


def launch_key_and_value_gradients(
    operands: Operands, gradient: OutputGradient, *, interpret: bool
) -> tuple[Array, Array]:
    """DK and dV: by one kernel if all columns of a value fit into a tile, else by two."""
    q, k, v, intervals = operands
    H, M, value_width = q.shape[2], k.shape[1], v.shape[3]
    tiles = _tiles(operands, "key_gradient")
    dv_type = jax.ShapeDtypeStruct(v.shape, v.dtype)
    dk, dv = _launch(
        "key_gradient",
        [q, k, v, *gradient, *intervals, *query_runs(intervals, M, tiles.keys), q.shape[1], M],
        [
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            dv_type if tiles.is_narrow else jax.ShapeDtypeStruct((1,), v.dtype),
        ],
        (k.shape[0] * H * -(-M // tiles.keys),),
        operands,
        tiles,
        interpret,
    )
    if tiles.is_narrow:
        return dk, dv
    tiles = _tiles(operands, "value_gradient")
    runs = query_runs(intervals, M, tiles.keys)
    (dv,) = _launch(
        "value_gradient",
        [q, k, gradient.do, gradient.lse, *intervals, *runs, q.shape[1], M],
        [dv_type],
        (k.shape[0] * H * -(-M // tiles.keys), -(-value_width // tiles.value_block)),
        operands,
        tiles,
        interpret,
    )
    return dk, dv


def query_runs(
    intervals: Intervals, num_keys: int, size: int
) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
    """The first query that sees a tile of `size` keys, and the query after the last, for each tile.

    All queries between them see the tile, apart from those that see no key at all.
    """
    start, stop = intervals
    sees_keys = start < stop
    # Queries that see no key repeat the bounds of the query before them: both stay sorted.
    start, stop = (jax.lax.cummax(jnp.where(sees_keys, x, 0), axis=1) for x in (start, stop))
    key = jnp.arange(0, num_keys, size, dtype=jnp.int32)

    def count(bounds: Int32[Array, " L"], limit: Array, side: Literal["left", "right"]) -> Array:
        # Unrolled: a loop on a GPU would launch every step of the search.
        return jnp.searchsorted(bounds, limit, side=side, method="scan_unrolled").astype(jnp.int32)

    first = jax.vmap(lambda bounds: count(bounds, key, "right"))(stop)
    end = jax.vmap(lambda bounds: count(bounds, key + size, "left"))(start)
    return first, end


def _tiles(operands: Operands, which: Pass) -> AttentionTiles:
    q, _, v, _ = operands
    dtype = jnp.promote_types(q.dtype, v.dtype)
    limits = find_target().gpu_limits
    return choose_tiles(which, q.shape[3], v.shape[3], dtype, limits.shared_memory)


def _launch(
    name: Pass,
    arguments: list[Array | int],
    out_type: list[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    operands: Operands,
    tiles: AttentionTiles,
    interpret: bool,
) -> list[Array]:
    kernels = triton.load_kernels(MODULE, interpret=interpret)
    q, _, v, _ = operands
    constants = {
        "HEADS": q.shape[2],
        "DK": q.shape[3],
        "DV": v.shape[3],
        "KEY_BLOCK": tiles.key_block,
        "VALUE_BLOCK": tiles.value_block,
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
    }
    if name not in ("output", "value_gradient"):
        constants["IS_NARROW"] = tiles.is_narrow
    if name not in ("query_gradient", "key_gradient"):
        constants["KEY_SLICE"] = tiles.key_slice
    return triton.launch(
        getattr(kernels, f"chunk_attention_{name}"),
        arguments,
        out_type,
        grid=grid,
        constants=constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )
