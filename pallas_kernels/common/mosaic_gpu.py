"""The one launcher of Mosaic GPU kernels."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.target import is_interpreted


def interpret_params() -> Any:
    """The `interpret` argument of kernels traced here: None unless inside `interpreted`."""
    return plgpu.InterpretGPUParams() if is_interpreted() else None


def launch(
    kernel: Callable[[Any, Any, Any], None],
    operands: Any,
    out_type: Any,
    *,
    name: str,
    grid: Mapping[str, int],
    scratch: Any = (),
    num_warpgroups: int = 1,
    approx_math: bool = False,
    interpret: Any = None,
) -> Any:
    """Runs `kernel(operand_refs, result_refs, scratch_refs)` in every block of the grid.

    Args:
      kernel: the kernel's body; its arguments have the tree structures of the next three.
      operands: tree of arrays in global memory; None leaves stay None.
      out_type: tree of `jax.ShapeDtypeStruct`.
      name: name of the kernel in profiles and in reports of the compiler.
      grid: size of every grid axis by its name.
      scratch: tree of shared memory and barriers.
      num_warpgroups: warpgroups of a block; above 1 they form the axis "warpgroup".
      approx_math: use the hardware's approximate exp, rsqrt and division.
      interpret: from `interpret_params`.

    Returns:
      Arrays in the structure of `out_type`.
    """
    arrays, operand_tree = jax.tree.flatten(operands)
    results, result_tree = jax.tree.flatten(out_type)
    memory, memory_tree = jax.tree.flatten(scratch)

    def body(*refs):
        first, second = len(arrays), len(arrays) + len(results)
        kernel(
            jax.tree.unflatten(operand_tree, refs[:first]),
            jax.tree.unflatten(result_tree, refs[first:second]),
            jax.tree.unflatten(memory_tree, refs[second:]),
        )

    body.__name__ = name
    threads: Any = {"num_threads": num_warpgroups, "thread_name": "warpgroup"}
    out = plgpu.kernel(
        body,
        out_type=results,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=memory,
        # Warpgroup semantics, the default of newer JAX, spend minutes on inferring layouts that
        # the kernels state themselves.
        compiler_params=plgpu.CompilerParams(
            approx_math=approx_math,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
        **(threads if num_warpgroups > 1 else {}),
    )(*arrays)
    return jax.tree.unflatten(result_tree, out)


def store(ref: Any, value: Any) -> None:
    """Stores an array into shared or global memory, by any instructions that its layout allows."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        # JAX before 0.12.
        ref[...] = value
