"""The one launcher of Pallas TPU kernels: operands, results and scratch by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

# An array (or the shape of a result) and the block of it that a grid step sees.
Operand = tuple[Array | jax.ShapeDtypeStruct, pl.BlockSpec]


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    dimension_semantics: Sequence[Literal["parallel", "arbitrary"]],
    inputs: Mapping[str, Operand],
    outputs: Mapping[str, Operand],
    scratch: Mapping[str, Any] | None = None,
    prefetched: Mapping[str, Array] | None = None,
    aliases: Mapping[str, str] | None = None,
    vmem_limit: int,
    flops: int,
    bytes_accessed: int | None = None,
    interpret: Any,
) -> dict[str, Array]:
    """Runs `kernel(**references by name)` on every step of the grid.

    Args:
      kernel: the kernel's body; takes the names of all that follows as keywords.
      name: name of the kernel in profiles.
      grid: sizes of the grid's axes.
      dimension_semantics: "parallel" or "arbitrary" for every axis.
      inputs: arrays with their blocks.
      outputs: shapes of results with their blocks.
      scratch: VMEM or SMEM that stays over the grid's steps.
      prefetched: integers that index maps see as well, in SMEM.
      aliases: names of inputs, and of the outputs that take their memory: blocks that no step
        writes keep their content.
      vmem_limit: bytes of VMEM that the kernel may use.
      flops: estimate for XLA's scheduler.
      bytes_accessed: another estimate for it; None: the bytes of all operands and results.
      interpret: as in `pl.pallas_call`.

    Returns:
      Results by name.
    """
    scratch, prefetched = scratch or {}, prefetched or {}
    names = [*prefetched, *inputs, *outputs, *scratch]
    arrays = [*prefetched.values(), *(value for value, _ in inputs.values())]
    shapes = [value for value, _ in outputs.values()]
    if bytes_accessed is None:
        bytes_accessed = sum(a.size * a.dtype.itemsize for a in [*arrays, *shapes])
    results = pl.pallas_call(
        lambda *refs: kernel(**dict(zip(names, refs, strict=True))),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=grid,
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(dimension_semantics), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, bytes_accessed=bytes_accessed, transcendentals=0
        ),
        input_output_aliases={
            names.index(source): list(outputs).index(target)
            for source, target in (aliases or {}).items()
        },
        interpret=interpret,
        name=name,
    )(*arrays)
    return dict(zip(outputs, results, strict=True))
