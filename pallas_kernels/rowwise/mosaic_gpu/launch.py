"""Launch of a row kernel: grid and results."""

from functools import partial
from typing import Any

import jax
from jax.experimental import pallas as pl

from pallas_kernels.common.mosaic_gpu import launch
from pallas_kernels.rowwise.mosaic_gpu.block_sizes import RowTiling
from pallas_kernels.rowwise.mosaic_gpu.pipeline import (
    RowFunction,
    RowIterator,
    RowOperands,
    RowResults,
)


def launch_rows(
    function: RowFunction,
    operands: RowOperands,
    dtypes: RowResults,
    tiling: RowTiling,
    *,
    name: str,
    interpret: Any,
) -> RowResults:
    """Applies `function` to every row.

    Args:
      function: from one row of the operands in registers to one of the results.
      operands: arrays.
      dtypes: dtypes of the results; None for a result that is not wanted.
      tiling: how rows are divided into blocks; the tile must divide the width.
      name: name of the kernel in profiles.
      interpret: from `interpret_params`.

    Returns:
      Rows and moments; sums of every block, to be added up.
    """
    num_rows, width = operands.rows[0].shape
    rows_per_block = tiling.rows_per_block(num_rows, width)
    num_blocks = pl.cdiv(num_rows, rows_per_block)
    shapes = RowResults(rows=(num_rows, width), sums=(num_blocks, width), moments=(num_rows,))
    out_type = RowResults(
        *(
            jax.tree.map(partial(jax.ShapeDtypeStruct, shape), field_dtypes)
            for shape, field_dtypes in zip(shapes, dtypes, strict=True)
        )
    )

    def kernel(operands: RowOperands, results: RowResults, scratch: Any) -> None:
        del scratch
        RowIterator(function, operands, results, tiling, num_rows).run(rows_per_block)

    return launch(
        kernel,
        operands,
        out_type,
        name=name,
        grid={"r": num_blocks, "c": width // tiling.tile},
        approx_math=True,
        interpret=interpret,
    )
