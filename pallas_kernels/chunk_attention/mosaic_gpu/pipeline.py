"""Warpgroups of Hopper that multiply, and one that copies ahead of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Type checkers do not see that the classes are complete.
_TRANSFORMS: Any = (
    plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)
# Public, but type checkers do not see it.
Accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
# Rows of a tile that one warpgroup multiplies, and how a number for each lies in its registers.
ROWS = 64
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
# Of an H100 SXM and an H200; with fewer, blocks queue.
_MULTIPROCESSORS = 132
# Blocks of an interpreted kernel: few, so that each has several units of work.
_INTERPRETED_BLOCKS = 3


class Pipeline(NamedTuple):
    """Slots of shared memory between the copying warpgroup and the multiplying ones.

    Steps are counted from the kernel's start.
    """

    full: Any
    free: Any
    count: int

    def fill(self, first: Any, steps: Any, copy: Callable[[Any, Any, Any], None]) -> None:
        """Runs `copy(step, slot, barrier)` ahead of the others, counting from `first`."""

        def body(i, _):
            step = first + i
            slot = lax.rem(step, self.count)
            pl.when(step >= self.count)(partial(plgpu.barrier_wait, self.free.at[slot]))
            copy(i, slot, self.full.at[slot])
            return ()

        lax.fori_loop(0, steps, body, ())

    def drain(self, steps: Any) -> None:
        """Waits until all of `steps` steps have been used."""

        def body(step, _):
            plgpu.barrier_wait(self.free.at[lax.rem(step, self.count)])
            return ()

        lax.fori_loop(lax.max(steps - self.count, 0), steps, body, ())

    def multiply(self, first: Any, steps: Any, add: Callable[[Any, Any], None]) -> None:
        """Runs `add(step, slot)`, one wgmma each, over slots as they fill."""

        def body(i, _):
            step = first + i
            slot = lax.rem(step, self.count)
            plgpu.barrier_wait(self.full.at[slot])
            add(i, slot)
            # The product before this one is done with its slot.
            plgpu.wgmma_wait(1)
            before = lax.rem(step + self.count - 1, self.count)
            pl.when(i > 0)(lambda: plgpu.barrier_arrive(self.free.at[before]))
            return ()

        lax.fori_loop(0, steps, body, ())
        plgpu.wgmma_wait(0)
        final = lax.rem(first + steps - 1, self.count)
        pl.when(steps > 0)(lambda: plgpu.barrier_arrive(self.free.at[final]))


def staged(*shape: int, dtype: Any = jax.numpy.bfloat16) -> Any:
    """Shared memory that wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=_TRANSFORMS)


def launch(
    kernel: Callable[..., None],
    operands: tuple,
    out_type: Any,
    *,
    name: str,
    grid: dict[str, int],
    scratch: list[Any],
    stages: int,
    copies: int,
    interpret: Any,
) -> Any:
    """Runs `kernel(pipeline, *operands, results, *scratch)` in three warpgroups of every block.

    Args:
      kernel: what a block does.
      operands: arrays, in tuples; None stays None.
      out_type: shapes and dtypes of the results.
      name: what profiles call it.
      grid: sizes of the grid by name.
      scratch: shared memory and barriers.
      stages: slots of the pipeline.
      copies: copies that fill a slot.
      interpret: `plgpu.InterpretGPUParams()` or None.
    """
    arrays, structure = jax.tree.flatten(operands)
    outs, out_structure = jax.tree.flatten(out_type)

    def body(*refs):
        inputs = jax.tree.unflatten(structure, refs[: len(arrays)])
        results = jax.tree.unflatten(out_structure, refs[len(arrays) : len(arrays) + len(outs)])
        *buffers, full, free = refs[len(arrays) + len(outs) :]
        kernel(Pipeline(full, free, stages), *inputs, results, *buffers)

    body.__name__ = name
    results = plgpu.kernel(
        body,
        out_type=outs,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            *scratch,
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )(*arrays)
    return jax.tree.unflatten(out_structure, results)


def load_rows(numbers: Any) -> Any:
    """A number for each of a warpgroup's rows from global memory."""
    return plgpu.load(numbers, layout=ROW_LAYOUT, optimized=False)


def count_blocks(units: int, interpret: Any) -> int:
    """Blocks that stay on their multiprocessor and share `units` units of work."""
    return min(units, _MULTIPROCESSORS if interpret is None else _INTERPRETED_BLOCKS)


def by_warpgroup(copy: Callable[[], None], compute: Callable[[Any], None]) -> None:
    """`compute(0)` and `compute(1)` in two warpgroups, `copy()` in the third."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(232, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        copy()
