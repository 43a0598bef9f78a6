"""Warp specialization on Hopper: a producer warpgroup copies, two consumer warpgroups multiply."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.devices import HOPPER

NUM_WARPGROUPS = 3
_CONSUMERS = 2
# Registers of a thread: two consumer warpgroups and the producer use 64,512 of HOPPER.registers.
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 232, 40
# Rows of a tile that one consumer warpgroup multiplies, and the layout of one number for each.
WARPGROUP_ROWS = 64
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
# Public, but type checkers do not see it.
Accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
# Type checkers do not see that the classes are complete.
_TRANSFORMS: Any = (
    plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)
# Few blocks in the interpreter, so that each has several work items.
_INTERPRETED_BLOCKS = 3


class Pipeline(NamedTuple):
    """A ring of shared memory stages between the producer and the consumer warpgroups.

    Steps are counted from the kernel's start; step s uses stage s modulo `num_stages`.

    Attributes:
      full_barrier: for every stage, completes when its copies have arrived.
      consumed_barrier: for every stage, completes when both consumer warpgroups have read it.
    """

    full_barrier: Any
    consumed_barrier: Any

    @property
    def num_stages(self) -> int:
        """Stages of the ring."""
        return self.full_barrier.shape[0]

    def produce(self, first: Any, num_steps: Any, copy: Callable[[Any, Any, Any], None]) -> None:
        """Runs `copy(i, stage, barrier)` for steps first + i, ahead of the consumers."""

        def body(i, _):
            step = first + i
            stage = lax.rem(step, self.num_stages)
            wait = partial(plgpu.barrier_wait, self.consumed_barrier.at[stage])
            pl.when(step >= self.num_stages)(wait)
            copy(i, stage, self.full_barrier.at[stage])
            return ()

        lax.fori_loop(0, num_steps, body, ())

    def producer_tail(self, num_steps: Any) -> None:
        """Waits until the consumers have read the last stages of `num_steps` steps."""

        def body(step, _):
            plgpu.barrier_wait(self.consumed_barrier.at[lax.rem(step, self.num_stages)])
            return ()

        lax.fori_loop(lax.max(num_steps - self.num_stages, 0), num_steps, body, ())

    def consume(self, first: Any, num_steps: Any, multiply: Callable[[Any], None]) -> None:
        """Runs `multiply(stage)`, one asynchronous wgmma, for steps from `first` on."""

        def body(i, _):
            step = first + i
            stage = lax.rem(step, self.num_stages)
            plgpu.barrier_wait(self.full_barrier.at[stage])
            multiply(stage)
            # The previous step's wgmma has then read its stage.
            plgpu.wgmma_wait(1)
            previous = lax.rem(step + self.num_stages - 1, self.num_stages)
            pl.when(i > 0)(lambda: plgpu.barrier_arrive(self.consumed_barrier.at[previous]))
            return ()

        lax.fori_loop(0, num_steps, body, ())
        plgpu.wgmma_wait(0)
        last = lax.rem(first + num_steps - 1, self.num_stages)
        pl.when(num_steps > 0)(lambda: plgpu.barrier_arrive(self.consumed_barrier.at[last]))


def pipeline_barriers(num_stages: int, *, copies: int) -> Pipeline:
    """Scratch of a pipeline whose stages are each filled by `copies` copies."""
    return Pipeline(
        plgpu.Barrier(num_arrivals=copies, num_barriers=num_stages),
        plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=num_stages),
    )


def wgmma_smem(*shape: int, dtype: Any = jax.numpy.bfloat16) -> Any:
    """Scratch in shared memory, tiled and swizzled for wgmma."""
    return plgpu.SMEM(shape, dtype, transforms=_TRANSFORMS)


def load_row_values(gmem: Any) -> Any:
    """Loads one number for each of a warpgroup's rows from global memory."""
    return plgpu.load(gmem, layout=ROW_LAYOUT, optimized=False)


def num_persistent_blocks(work_items: int, interpret: Any) -> int:
    """Blocks that stay on their multiprocessor and take one work item after the other."""
    return min(work_items, HOPPER.multiprocessors if interpret is None else _INTERPRETED_BLOCKS)


def warp_specialize(produce: Callable[[], None], consume: Callable[[Any], None]) -> None:
    """Runs `produce()` in one warpgroup and `consume(index)` in the two others."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < _CONSUMERS)
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        consume(warpgroup)

    @pl.when(warpgroup == _CONSUMERS)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        produce()
