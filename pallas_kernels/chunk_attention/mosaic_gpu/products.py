"""Matrix products over a band of scores: O = P V, dQ = dS K, dV = Pᵀ dO, dK = dSᵀ Q, and dS.

Blocks of threads stay on their multiprocessor and go from one tile of results to the next; while
two warpgroups round and write a tile, the third already copies for the next one.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels.chunk_attention.mosaic_gpu.band import (
    TILE,
    Band,
    Geometry,
    Runs,
    Spans,
    count_key_tiles,
    first_key_tile,
    last_query_tile,
    unravel,
)
from pallas_kernels.chunk_attention.mosaic_gpu.pipeline import (
    ROWS,
    Accumulator,
    by_warpgroup,
    count_blocks,
    launch,
    load_rows,
    staged,
)

# Terms of a sum that one step brings, and columns of a tile of results.
_DEPTH, _WIDTH = 64, 256
_STAGES = 4
# Columns of results that are written at once.
_PART = 64


def _unit_of(turn: Any, blocks: int) -> Any:
    """A block's unit of work: the next of `blocks` every turn, shifted against regularities."""
    return turn * blocks + lax.rem(lax.axis_index("block") + 37 * turn, blocks)


def _write(value: Any, part: Any, target: Any, pending: int) -> None:
    """Writes registers (64, 64) to `target` through `part`, one of two buffers.

    `pending`: 1 if the write before this one took the other buffer; 0 if it may be this one.
    """
    plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
    part[...] = value.astype(part.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(part, target)


def _product_kernel(
    pipe,
    band,
    weights,
    repaired,
    x,
    scale,
    out,
    a_s,
    x_s,
    out_s,
    *,
    geometry,
    blocks,
    is_transposed,
):
    width = x_s.shape[2]
    halves = TILE // _DEPTH
    columns = out.shape[3] // width
    run = Runs(out.shape[1] // TILE, geometry.period)
    sizes = (geometry.rows, geometry.heads, run.count, run.pairs, columns)
    units = math.prod(sizes)
    turns = 2 * -(-units // blocks)
    # An odd number of parts ends and begins with the same buffer.
    pending = 1 - width // _PART % 2

    def find(turn):
        """Place of the tile of a turn, the first tile it is a sum over, and how many steps."""
        unit = _unit_of(lax.div(turn, 2), blocks)
        row, head, part, pair, column = unravel(jnp.minimum(unit, units - 1), sizes)
        tile, is_live = run.tile(part, pair, lax.rem(turn, 2) == 1)
        is_live = is_live & (unit < units)
        if is_transposed:
            first = jnp.maximum(tile - geometry.offset, 0)
            count = jnp.maximum(last_query_tile(band, geometry, row, tile) + 1 - first, 0)
        else:
            first = first_key_tile(band, geometry, row, tile)
            count = count_key_tiles(band, geometry, row, tile)
        steps = jnp.where(is_live, count * halves, 0)
        return (row, head, tile, pl.ds(column * width, width)), first, steps, is_live

    def copy():
        def fill(turn, done):
            (row, head, tile, n), first, steps, _ = find(turn)
            is_repaired = repaired is not None and repaired[1][row, head, tile] != 0

            def copy_step(step, slot, barrier):
                if is_transposed:
                    query = first + lax.div(step, halves)
                    half = lax.rem(step, halves) * _DEPTH
                    before = first_key_tile(band, geometry, row, query)
                    keys = pl.ds((tile - before) * TILE, TILE)
                    place = row, head, query, pl.ds(half, _DEPTH), keys
                else:
                    place = row, head, tile, slice(None), pl.ds(step * _DEPTH, _DEPTH)

                def copy_part(source):
                    plgpu.copy_gmem_to_smem(source.at[place], a_s.at[slot], barrier)

                if repaired is None:
                    copy_part(weights)
                else:
                    pl.when(is_repaired)(lambda: copy_part(repaired[0]))
                    pl.when(jnp.logical_not(is_repaired))(lambda: copy_part(weights))
                tokens = pl.ds(first * TILE + step * _DEPTH, _DEPTH)
                plgpu.copy_gmem_to_smem(x.at[row, tokens, head, n], x_s.at[slot], barrier)

            pipe.fill(done, steps, copy_step)
            return done + steps

        pipe.drain(lax.fori_loop(0, turns, fill, 0))

    def compute(warpgroup):
        rows = pl.ds(warpgroup * ROWS, ROWS)

        def multiply(turn, done):
            (row, head, tile, n), *_, steps, is_live = find(turn)
            tokens = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)

            @pl.when(is_live)
            def make_tile():
                factor = load_rows(scale.at[row, head, tokens]) if scale is not None else None

                def sum_up(acc):
                    def add(_, slot):
                        a = a_s.at[slot, :, rows] if is_transposed else a_s.at[slot, rows]
                        plgpu.wgmma(acc, a.transpose((1, 0)) if is_transposed else a, x_s.at[slot])

                    pipe.multiply(done, steps, add)
                    return acc[...]

                total = pl.run_scoped(sum_up, Accumulator((ROWS, width), jnp.float32))
                if factor is not None:
                    total = total * lax.broadcast_in_dim(factor, total.shape, [0])
                for i, start in enumerate(range(0, width, _PART)):
                    target = out.at[row, tokens, head, n].at[:, pl.ds(start, _PART)]
                    value = total[:, start : start + _PART]
                    _write(value, out_s.at[warpgroup, i % 2], target, pending)

            return done + steps

        lax.fori_loop(0, turns, multiply, 0)
        plgpu.wait_smem_to_gmem(0)

    by_warpgroup(copy, compute)


def band_product(
    band: Band,
    weights: BFloat16[Array, "B H I 128 W"],
    x: BFloat16[Array, "B N H D"],
    scale: Float[Array, "B H L"] | None,
    geometry: Geometry,
    interpret: Any,
    *,
    is_transposed: bool = False,
    repaired: tuple[BFloat16[Array, "B H I 128 W"], Int32[Array, "B H I"]] | None = None,
) -> BFloat16[Array, "B N H D"]:
    """The sums over s of scale[t] weights[t, s] x[s]; transposed, over t of weights[t, s] x[t].

    Query tiles with a 1 in repaired[1] take repaired[0] for weights, not where transposed.
    """
    width = min(_WIDTH, x.shape[3])
    tiles = geometry.key_tiles if is_transposed else geometry.query_tiles
    run = Runs(tiles, geometry.period)
    columns = x.shape[3] // width
    units = geometry.rows * geometry.heads * run.count * run.pairs * columns
    blocks = count_blocks(units, interpret)
    return launch(
        partial(
            _product_kernel,
            geometry=geometry,
            blocks=blocks,
            is_transposed=is_transposed,
        ),
        (band, weights, repaired, x, scale),
        jax.ShapeDtypeStruct((geometry.rows, tiles * TILE, *x.shape[2:]), x.dtype),
        name="chunk_attention_band_" + ("transpose_product" if is_transposed else "product"),
        grid={"block": blocks},
        scratch=[
            staged(_STAGES, _DEPTH, TILE) if is_transposed else staged(_STAGES, TILE, _DEPTH),
            staged(_STAGES, _DEPTH, width),
            staged(2, 2, ROWS, _PART),
        ],
        stages=_STAGES,
        copies=2,
        interpret=interpret,
    )


# Key tiles whose scores' gradients are made together.
_TOGETHER = 2


def _find_gradients(band: Band, geometry: Geometry, unit: Any) -> tuple[Any, Any, Any]:
    """A unit's (row, head, query tile, key tile), whether there are two of those, and any at all.

    First come all pairs of key tiles, then what is left of query tiles with an odd number.
    """
    spans = Spans(geometry, _TOGETHER)
    pairs, sizes = math.prod(spans.sizes), (*spans.sizes[:-1], 2)
    singles = math.prod(sizes)
    is_pair = unit < pairs
    row, head, run, pair, second = unravel(jnp.clip(unit - pairs, 0, singles - 1), sizes)
    tile, is_live = spans.runs.tile(run, pair, second == 1)
    count = count_key_tiles(band, geometry, row, tile)
    is_live = is_live & (lax.rem(count, _TOGETHER) == 1) & (unit < pairs + singles)
    single = row, head, tile, count - 1, is_live
    *place, is_live = (
        jnp.where(is_pair, a, b) for a, b in zip(spans.find(band, unit), single, strict=True)
    )
    return tuple(place), is_pair, is_live


def _count_gradient_units(geometry: Geometry) -> int:
    *pairs, spans = Spans(geometry, _TOGETHER).sizes
    return math.prod(pairs) * (spans + 2)


def _gradient_kernel(pipe, band, weights, do, v, delta, out, do_s, v_s, out_s, *, geometry, blocks):
    depth_steps = v.shape[3] // _DEPTH
    turns = -(-_count_gradient_units(geometry) // blocks)

    def find(turn):
        place, is_pair, is_live = _find_gradients(band, geometry, _unit_of(turn, blocks))
        return place, jnp.where(is_live & is_pair, _TOGETHER, is_live.astype(jnp.int32))

    def copy():
        def fill(turn, done):
            (row, head, tile, column), tiles = find(turn)
            token = (first_key_tile(band, geometry, row, tile) + column) * TILE

            def copy_step(step, slot, barrier):
                part = pl.ds(step * _DEPTH, _DEPTH)
                rows = do.at[row, pl.ds(tile * TILE, TILE), head, part]
                plgpu.copy_gmem_to_smem(rows, do_s.at[slot], barrier)

                def copy_values(number):
                    keys = pl.ds(number * TILE, TILE)
                    values = v.at[row, pl.ds(token + number * TILE, TILE), head, part]
                    plgpu.copy_gmem_to_smem(values, v_s.at[slot, keys], barrier)

                copy_values(0)
                pl.when(tiles == _TOGETHER)(lambda: copy_values(1))
                pl.when(tiles < _TOGETHER)(lambda: plgpu.barrier_arrive(barrier))

            def copy_weights(number, slot, barrier):
                for half in range(TILE // _PART):
                    columns = pl.ds((column + number) * TILE + half * _PART, _PART)
                    part = weights.at[row, head, tile, :, columns]
                    own = v_s.at[slot, pl.ds(half * TILE, TILE)]
                    plgpu.copy_gmem_to_smem(part, own, barrier)
                plgpu.barrier_arrive(barrier)

            steps = jnp.where(tiles > 0, depth_steps, 0)
            pipe.fill(done, steps, copy_step)
            pipe.fill(done + steps, tiles, copy_weights)
            return done + steps + tiles

        pipe.drain(lax.fori_loop(0, turns, fill, 0))

    def compute(warpgroup):
        rows = pl.ds(warpgroup * ROWS, ROWS)

        def make(done, place, tiles):
            """Gradients of the scores of 64 queries and `tiles` key tiles."""
            row, head, tile, column = place
            tokens = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            mean = load_rows(delta.at[row, head, tokens])

            def sum_up(acc):
                def add(_, slot):
                    values = v_s.at[slot, pl.ds(0, tiles * TILE)].transpose((1, 0))
                    plgpu.wgmma(acc, do_s.at[slot, rows], values)

                pipe.multiply(done, depth_steps, add)
                return acc[...]

            total = pl.run_scoped(sum_up, Accumulator((ROWS, tiles * TILE), jnp.float32))
            total = total - lax.broadcast_in_dim(mean, total.shape, [0])
            for number in range(tiles):
                slot = lax.rem(done + depth_steps + number, pipe.count)
                plgpu.barrier_wait(pipe.full.at[slot])
                for half in range(TILE // _PART):
                    own = v_s.at[slot, pl.ds(half * TILE + warpgroup * ROWS, ROWS)]
                    values = plgpu.load(own, layout=plgpu.Layout.WGMMA, optimized=False)
                    values = values.astype(jnp.float32)
                    start = number * TILE + half * _PART
                    gradient = total[:, start : start + _PART]
                    # Not even an infinite gradient counts where the weight is zero.
                    gradient = jnp.where(values == 0, 0.0, values * gradient)
                    target = out.at[row, head, tile, rows, pl.ds(column * TILE + start, _PART)]
                    _write(gradient, out_s.at[warpgroup, half], target, 1)
                plgpu.barrier_arrive(pipe.free.at[slot])

        def multiply(turn, done):
            place, tiles = find(turn)
            pl.when(tiles == _TOGETHER)(lambda: make(done, place, _TOGETHER))
            pl.when(tiles == 1)(lambda: make(done, place, 1))
            return done + jnp.where(tiles > 0, depth_steps, 0) + tiles

        lax.fori_loop(0, turns, multiply, 0)
        plgpu.wait_smem_to_gmem(0)

    by_warpgroup(copy, compute)


def score_gradient(
    band: Band,
    weights: BFloat16[Array, "B H I 128 W"],
    do: BFloat16[Array, "B L H Dv"],
    v: BFloat16[Array, "B M H Dv"],
    delta: Float[Array, "B H L"],
    geometry: Geometry,
    interpret: Any,
) -> BFloat16[Array, "B H I 128 W"]:
    """weights * (do vᵀ - delta) in the band."""
    blocks = count_blocks(_count_gradient_units(geometry), interpret)
    return launch(
        partial(_gradient_kernel, geometry=geometry, blocks=blocks),
        (band, weights, do, v, delta),
        jax.ShapeDtypeStruct(geometry.shape, weights.dtype),
        name="chunk_attention_score_gradient",
        grid={"block": blocks},
        scratch=[
            staged(_STAGES, TILE, _DEPTH),
            staged(_STAGES, _TOGETHER * TILE, _DEPTH),
            staged(2, 2, ROWS, _PART),
        ],
        stages=_STAGES,
        copies=1 + _TOGETHER,
        interpret=interpret,
    )
