"""Launches of the Triton kernels on (rows, width) arrays: operands, result shapes, grids."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.common import triton
from pallas_kernels.common.target import find_target
from pallas_kernels.common.triton_sums import sum_partials
from pallas_kernels.rowwise.triton.block_sizes import GATE_TILE, RowPrograms, choose_programs

MODULE = "pallas_kernels.rowwise.triton.kernels"


def launch_norm_forward(
    rows: Sequence[Array | None],
    vectors: Sequence[Array | None],
    *,
    dtype: Any,
    eps: float,
    centered: bool,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """y, means and r = 1 / sqrt(var + eps) from rows (x, added), vectors (offset, scale, bias)."""
    x, added = rows
    assert x is not None
    offset, scale, bias = vectors
    programs = _programs(x, norm=True, backward=False)
    moment = jax.ShapeDtypeStruct((x.shape[0],), jnp.float32)
    results = _launch(
        "rowwise_norm_forward",
        [x, added, offset, scale, bias, x.shape[0]],
        [jax.ShapeDtypeStruct(x.shape, dtype), moment, moment],
        (programs.num_programs,),
        programs,
        {
            "WIDTH": x.shape[1],
            "EPS": eps,
            "CENTERED": centered,
            "ADDED": added is not None,
            "OFFSET": offset is not None,
            "SCALE": scale is not None,
            "BIAS": bias is not None,
        },
        interpret,
    )
    return results[0], results[1], results[2]


def launch_norm_backward(
    rows: Sequence[Array | None],
    vectors: Sequence[Array | None],
    moments: tuple[Array, Array],
    dy: Array,
    *,
    centered: bool,
    interpret: bool,
) -> tuple[Array, list[Array | None]]:
    """dx, and the gradients of (offset, scale, bias)."""
    x, added = rows
    assert x is not None
    offset, scale, bias = vectors
    programs = _programs(x, norm=True, backward=True)
    dx, *sums = _launch(
        "rowwise_norm_backward",
        [x, added, dy, offset, scale, *moments, x.shape[0]],
        [jax.ShapeDtypeStruct(x.shape, x.dtype)]
        + [_sums(vector, x, programs) for vector in vectors],
        (programs.num_programs,),
        programs,
        {
            "WIDTH": x.shape[1],
            "PREFETCH": programs.prefetch,
            "CENTERED": centered,
            "ADDED": added is not None,
            "OFFSET": offset is not None,
            "SCALE": scale is not None,
            "BIAS": bias is not None,
        },
        interpret,
    )
    return dx, _add_up(vectors, sums, interpret)


def launch_gate_forward(
    rows: Sequence[Array | None], bias: Array | None, *, dtype: Any, interpret: bool
) -> Array:
    """silu(x + bias), times y if there is one, from rows (x, y)."""
    x, y = rows
    assert x is not None
    programs = _programs(x, norm=False, backward=False)
    (out,) = _launch(
        "rowwise_gate_forward",
        [x, y, bias, x.shape[0]],
        [jax.ShapeDtypeStruct(x.shape, dtype)],
        (programs.num_programs, -(-x.shape[1] // programs.block)),
        programs,
        {"WIDTH": x.shape[1], "GATE": y is not None, "BIAS": bias is not None},
        interpret,
    )
    return out


def launch_gate_backward(
    rows: Sequence[Array | None], bias: Array | None, d_out: Array, *, interpret: bool
) -> tuple[Array, Array | None, Array | None]:
    """dx, dy and the gradient of the bias."""
    x, y = rows
    assert x is not None
    programs = _programs(x, norm=False, backward=True)
    dy_shape = x.shape if y is not None else (1,)
    dx, dy, sums = _launch(
        "rowwise_gate_backward",
        [x, y, d_out, bias, x.shape[0]],
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(dy_shape, x.dtype),
            _sums(bias, x, programs),
        ],
        (programs.num_programs, -(-x.shape[1] // programs.block)),
        programs,
        {"WIDTH": x.shape[1], "GATE": y is not None, "BIAS": bias is not None},
        interpret,
    )
    return dx, None if y is None else dy, _add_up([bias], [sums], interpret)[0]


def gate_width(size: int) -> int:
    """The width that a gate without vectors sees: its rows may be cut anywhere."""
    return next(width for width in (GATE_TILE, 512, 256, 128, 1) if size % width == 0)


def _programs(x: Array, *, norm: bool, backward: bool) -> RowPrograms:
    multiprocessors = find_target().gpu_limits.multiprocessors
    return choose_programs(x.shape[0], x.shape[1], multiprocessors, norm=norm, backward=backward)


def _sums(vector: Array | None, x: Array, programs: RowPrograms) -> jax.ShapeDtypeStruct:
    """A program's partial sum of a vector's gradient; one number if there is no vector."""
    shape = (1,) if vector is None else (programs.num_programs, x.shape[1])
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _add_up(
    vectors: Sequence[Array | None], sums: Sequence[Array], interpret: bool
) -> list[Array | None]:
    pairs = zip(vectors, sums, strict=True)
    return [
        None if vector is None else sum_partials(partials, interpret=interpret)
        for vector, partials in pairs
    ]


def _launch(
    name: str,
    operands: list[Array | int | None],
    out_type: list[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    programs: RowPrograms,
    constants: dict[str, Any],
    interpret: bool,
) -> list[Array]:
    kernels = triton.load_kernels(MODULE, interpret=interpret)
    # A kernel does not read what is not there; the pointer is that of x.
    present = [operands[0] if operand is None else operand for operand in operands]
    return triton.launch(
        getattr(kernels, name),
        [operand for operand in present if operand is not None],
        out_type,
        grid=grid,
        constants={
            "BLOCK": programs.block,
            "R": programs.rows_per_step,
            "NUM_PROGRAMS": programs.num_programs,
            **constants,
        },
        num_warps=programs.num_warps,
        interpret=interpret,
    )
