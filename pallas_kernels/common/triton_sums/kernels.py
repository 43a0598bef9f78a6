"""The sum over the first axis of an array, in Triton."""

import triton
import triton.language as tl
from triton.language.standard import _sum_combine as add


@triton.jit
def sum_partials(
    partials, num_partials, sums, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """COLUMNS sums over the first axis of (num_partials, WIDTH)."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = (columns < WIDTH)[None, :]
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for first in range(0, num_partials, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        total += tl.load(partials + at, mask=(rows < num_partials)[:, None] & in_row, other=0.0)
    tl.store(sums + columns, tl.reduce(total, 0, add), mask=columns < WIDTH)
