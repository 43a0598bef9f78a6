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
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.chunk_attention.mosaic_gpu_band import (
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
from pallas_kernels.chunk_attention.mosaic_gpu_pipeline import (
    PAIR,
    by_warpgroup,
    count_blocks,
    launch,
    staged,
)

ROWS = TILE // 2
_DEPTH = 64
_WIDTH = 256
_STAGES = 4
# Columns of results that are written at once.
_PART = 64
ACCUMULATOR = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)


def _unit_of(turn: Any, blocks: int) -> Any:
    """A block's unit of work: the next of `blocks` every turn, shifted against regularities."""
    return turn * blocks + lax.rem(lax.axis_index("block") + 37 * turn, blocks)


def _write(value: Any, parts: Any, target: Any) -> None:
    """Writes registers (64, n) to `target` through two buffers in turn."""
    for number, start in enumerate(range(0, value.shape[1], _PART)):
        part = parts.at[number % 2]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        part[...] = value[:, start : start + _PART].astype(part.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(part, target.at[:, pl.ds(start, _PART)])


def _product_kernel(
    pipe,
    band,
    weights,
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
    is_paired,
):
    width = x_s.shape[2]
    halves = TILE // _DEPTH
    columns = out.shape[3] // width // (2 if is_paired else 1)
    run = Runs(out.shape[1] // TILE, geometry.period)
    sizes = (geometry.rows, geometry.heads, run.count, run.pairs, columns)
    units = math.prod(sizes)
    turns = 2 * -(-units // blocks)
    mine = lax.axis_index(PAIR) if is_paired else 0
    together = {"collective_axes": PAIR} if is_paired else {}

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
        if is_paired:
            column = 2 * column + mine
        steps = jnp.where(is_live, count * halves, 0)
        return (row, head, tile, pl.ds(column * width, width)), first, steps, is_live

    def copy():
        def fill(turn, done):
            (row, head, tile, n), first, steps, _ = find(turn)

            def copy_step(step, slot, barrier):
                if is_transposed:
                    query = first + lax.div(step, halves)
                    half = lax.rem(step, halves) * _DEPTH
                    before = first_key_tile(band, geometry, row, query)
                    keys = pl.ds((tile - before) * TILE, TILE)
                    part = weights.at[row, head, query, pl.ds(half, _DEPTH), keys]
                else:
                    part = weights.at[row, head, tile, :, pl.ds(step * _DEPTH, _DEPTH)]
                plgpu.copy_gmem_to_smem(part, a_s.at[slot], barrier, **together)
                tokens = pl.ds(first * TILE + step * _DEPTH, _DEPTH)
                plgpu.copy_gmem_to_smem(x.at[row, tokens, head, n], x_s.at[slot], barrier)

            pipe.fill(done, steps, copy_step)
            return done + steps

        pipe.drain(lax.fori_loop(0, turns, fill, 0))

    def compute(warpgroup):
        rows = pl.ds(warpgroup * ROWS, ROWS)

        def multiply(turn, done):
            (row, head, tile, n), _, steps, is_live = find(turn)
            tokens = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)

            @pl.when(is_live)
            def _():
                factor = None
                if scale is not None:
                    factor = plgpu.load(
                        scale.at[row, head, tokens], layout=ROW_LAYOUT, optimized=False
                    )

                def sum_up(acc):
                    def add(_, slot):
                        a = a_s.at[slot, :, rows] if is_transposed else a_s.at[slot, rows]
                        plgpu.wgmma(acc, a.transpose((1, 0)) if is_transposed else a, x_s.at[slot])

                    pipe.multiply(done, steps, add)
                    return acc[...]

                total = pl.run_scoped(sum_up, ACCUMULATOR((ROWS, width), jnp.float32))
                if factor is not None:
                    total = total * lax.broadcast_in_dim(factor, total.shape, [0])
                _write(total, out_s.at[warpgroup], out.at[row, tokens, head, n])

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
    is_paired: bool = False,
) -> BFloat16[Array, "B N H D"]:
    """scale[t] Σ_s weights[t, s] x[s]; transposed: Σ_t weights[t, s] x[t]."""
    width = min(_WIDTH, x.shape[3])
    tiles = geometry.key_tiles if is_transposed else geometry.query_tiles
    is_paired = is_paired and interpret is None and x.shape[3] // width % 2 == 0
    run = Runs(tiles, geometry.period)
    columns = x.shape[3] // width // (2 if is_paired else 1)
    units = geometry.rows * geometry.heads * run.count * run.pairs * columns
    blocks = count_blocks(units, interpret)
    if is_paired:
        blocks = min(units, 66)
    return launch(
        partial(
            _product_kernel,
            geometry=geometry,
            blocks=blocks,
            is_transposed=is_transposed,
            is_paired=is_paired,
        ),
        (band, weights, x, scale),
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
        is_paired=is_paired,
    )


# Key tiles whose scores' gradients are made together.
_TOGETHER = 2
_GRADIENT_STAGES = 3
# Steps before a block asks for its weights: those before it have left shared memory by then.
_STEPS_BEFORE_WEIGHTS = 4


def _gradient_kernel(
    pipe, band, weights, do, v, delta, out, do_s, v_s, p_s, p_full, *, geometry, blocks
):
    spans = Spans(geometry, _TOGETHER)
    run, pairs = spans.runs, math.prod(spans.sizes)
    single_sizes = (*spans.sizes[:-1], 2)
    singles = math.prod(single_sizes)
    all_steps = v.shape[3] // _DEPTH
    turns = -(-(pairs + singles) // blocks)

    def find_single(unit):
        """The last key tile of a query tile that sees an odd number of them."""
        row, head, part, pair, second = unravel(jnp.clip(unit, 0, singles - 1), single_sizes)
        tile, is_live = run.tile(part, pair, second == 1)
        count = count_key_tiles(band, geometry, row, tile)
        return row, head, tile, count - 1, is_live & (lax.rem(count, _TOGETHER) == 1)

    def find(turn):
        unit = _unit_of(turn, blocks)
        is_pair = unit < pairs
        row, head, tile, column, is_live = (
            jnp.where(is_pair, a, b)
            for a, b in zip(spans.find(band, unit), find_single(unit - pairs), strict=True)
        )
        is_live = is_live & (unit < pairs + singles)
        return (row, head, tile, column), is_pair, is_live, jnp.where(is_live, all_steps, 0)

    def copy():
        def fill(turn, done):
            (row, head, tile, column), is_pair, _, steps = find(turn)
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
                pl.when(is_pair)(lambda: copy_values(1))
                pl.when(jnp.logical_not(is_pair))(lambda: plgpu.barrier_arrive(barrier))

            pipe.fill(done, steps, copy_step)
            return done + steps

        pipe.drain(lax.fori_loop(0, turns, fill, 0))

    def compute(warpgroup):
        rows = pl.ds(warpgroup * ROWS, ROWS)

        def weights_of(place, number):
            row, head, tile, column = place
            return row, head, tile, rows, pl.ds((column + number) * TILE, TILE)

        def make(done, place, tiles):
            """Gradients of the scores of 64 queries and `tiles` key tiles."""
            row, head, tile, _ = place
            width = tiles * TILE
            tokens = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            mean = plgpu.load(delta.at[row, head, tokens], layout=ROW_LAYOUT, optimized=False)
            parts = [
                (p_s.at[warpgroup, i], p_full.at[_TOGETHER * warpgroup + i], weights_of(place, i))
                for i in range(tiles)
            ]

            def sum_up(acc):
                def add(_, slot):
                    values = v_s.at[slot, pl.ds(0, width)].transpose((1, 0))
                    plgpu.wgmma(acc, do_s.at[slot, rows], values)

                early = min(_STEPS_BEFORE_WEIGHTS, all_steps)
                pipe.multiply(done, early, add)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for own, full, part in parts:
                    plgpu.copy_gmem_to_smem(weights.at[part], own, full)
                pipe.multiply(done + early, all_steps - early, add)
                return acc[...]

            total = pl.run_scoped(sum_up, ACCUMULATOR((ROWS, width), jnp.float32))
            for i, (own, full, part) in enumerate(parts):
                gradient = total[:, i * TILE : (i + 1) * TILE]
                gradient = gradient - lax.broadcast_in_dim(mean, gradient.shape, [0])
                plgpu.barrier_wait(full)
                values = plgpu.load(own, layout=plgpu.Layout.WGMMA, optimized=False)
                values = values.astype(jnp.float32)
                # Not even an infinite gradient counts where the weight is zero.
                gradient = jnp.where(values == 0, 0.0, values * gradient)
                own[...] = gradient.astype(own.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own, out.at[part])

        def multiply(turn, done):
            place, is_pair, is_live, steps = find(turn)
            pl.when(is_live & is_pair)(lambda: make(done, place, _TOGETHER))
            pl.when(is_live & jnp.logical_not(is_pair))(lambda: make(done, place, 1))
            return done + steps

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
    *pairs, spans = Spans(geometry, _TOGETHER).sizes
    blocks = count_blocks(math.prod(pairs) * (spans + 2), interpret)
    return launch(
        partial(_gradient_kernel, geometry=geometry, blocks=blocks),
        (band, weights, do, v, delta),
        jax.ShapeDtypeStruct(geometry.shape, weights.dtype),
        name="chunk_attention_score_gradient",
        grid={"block": blocks},
        scratch=[
            staged(_GRADIENT_STAGES, TILE, _DEPTH),
            staged(_GRADIENT_STAGES, _TOGETHER * TILE, _DEPTH),
            staged(2, _TOGETHER, ROWS, TILE),
            plgpu.Barrier(num_arrivals=1, num_barriers=2 * _TOGETHER),
        ],
        stages=_GRADIENT_STAGES,
        copies=1 + _TOGETHER,
        interpret=interpret,
    )
