"""Sums over the first axis of an array, in Triton."""

import triton
import triton.language as tl
from triton.language.standard import _sum_combine as add

from pallas_kernels.common.triton import device_function


@device_function
def add_up(
    partials, num_partials, columns, in_row, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of COLUMNS columns of an array with rows of STRIDE numbers."""
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for first in range(0, num_partials, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * STRIDE + columns[None, :]
        mask = (rows < num_partials)[:, None] & in_row[None, :]
        total += tl.load(partials + at, mask=mask, other=0.0)
    return tl.reduce(total, 0, add)


@triton.jit
def sum_partials(
    partials, num_partials, sums, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """COLUMNS sums over the first axis of (num_partials, WIDTH)."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = columns < WIDTH
    total = add_up(partials, num_partials, columns, in_row, WIDTH, ROWS, COLUMNS)
    tl.store(sums + columns, total, mask=in_row)


@triton.jit
def sum_pairs(
    partials, num_partials, first, second, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS sums over the first axis of (num_partials, 2, WIDTH), of one of the two."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = columns < WIDTH
    which = tl.program_id(1)
    total = add_up(
        partials + which * WIDTH, num_partials, columns, in_row, 2 * WIDTH, ROWS, COLUMNS
    )
    if which == 0:
        tl.store(first + columns, total, mask=in_row)
    else:
        tl.store(second + columns, total, mask=in_row)
