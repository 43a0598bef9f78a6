"""The one launcher of Mosaic GPU kernels."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

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
    cluster: Mapping[str, int] | None = None,
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
      cluster: blocks that run together and read each other's shared memory, by the axis's name; for
        every block of the grid. None: one.
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
        cluster=tuple((cluster or {}).values()),
        cluster_names=tuple(cluster or {}),
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


def cluster_arrive() -> None:
    """Tells the blocks of the cluster that this one's writes so far are done, and its reads."""

    @plgpu.inline_mgpu()
    def arrive(_: Any) -> None:
        nvvm.cluster_arrive(aligned=True)

    arrive()  # pyright: ignore[reportCallIssue]


def cluster_wait() -> None:
    """Waits for `cluster_arrive` of all blocks of the cluster."""

    @plgpu.inline_mgpu()
    def wait(_: Any) -> None:
        nvvm.cluster_wait(aligned=True)

    wait()  # pyright: ignore[reportCallIssue]


def widen_int8(values: Any, layout: Any, *, is_interpreted: bool) -> Any:
    """8-bit integers as float32, in two instructions a number and one for four.

    The compiler's own conversion takes four, one of them of a sixteenth of the rate. A byte b + 128
    is put below the exponent of 2^23, which gives the float32 number 2^23 + b + 128, exactly.

    Args:
      values: int8; fast for a multiple of 4 adjacent ones in a thread.
      layout: of the values.
      is_interpreted: whether the kernel's interpreter runs this, which knows arrays only.
    """
    return _widen(values, layout, 4, _widen_int8_vector, is_interpreted)


def widen_bfloat16(values: Any, layout: Any, *, is_interpreted: bool) -> Any:
    """bfloat16 as float32 in one instruction a number, where the compiler takes three for two.

    Args:
      values: bfloat16; fast for a multiple of 2 adjacent ones in a thread.
      layout: of the values.
      is_interpreted: as in `widen_int8`.
    """
    return _widen(values, layout, 2, _widen_bfloat16_vector, is_interpreted)


def _widen(
    values: Any,
    layout: Any,
    numbers_of_a_word: int,
    widen_vector: Callable[[Any], Any],
    is_interpreted: bool,
) -> Any:
    """Numbers as float32: by `widen_vector` where a thread's fill whole words of 32 bits."""
    if is_interpreted:
        return values.astype(jnp.float32)

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(values.shape, np.dtype(np.float32), layout=layout),
    )
    def in_registers(_: Any, values: Any) -> Any:
        [size] = ir.VectorType(values.registers.flat[0].type).shape
        if size % numbers_of_a_word:
            return values.astype(ir.F32Type.get())
        wide = np.array([widen_vector(each) for each in values.registers.flat], dtype=object)
        return mgpu.FragmentedArray(
            _registers=wide.reshape(values.registers.shape),
            _layout=values.layout,
            _is_signed=None,
        )

    return in_registers(values)  # pyright: ignore[reportCallIssue]


def _widen_bfloat16_vector(values: Any) -> Any:
    """A vector of bfloat16 as a vector of float32, whose upper halves they are."""
    size = ir.VectorType(values.type).shape[0]
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    words = mgpu_utils.bitcast(values, ir.VectorType.get((size // 2,), i32))
    half, upper = mgpu.c(16, i32), mgpu.c(-(2**16), i32)
    wide = llvm.mlir_undef(ir.VectorType.get((size,), f32))
    for i in range(size):
        word = _extract(words, i // 2)
        bits = arith.andi(word, upper) if i % 2 else arith.shli(word, half)
        wide = llvm.insertelement(wide, arith.bitcast(f32, bits), position=mgpu.c(i, i32))
    return wide


def _extract(words: Any, index: int) -> Any:
    return vector.extract(
        words, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index])
    )


def _widen_int8_vector(values: Any) -> Any:
    """A vector of int8 as a vector of float32."""
    size = ir.VectorType(values.type).shape[0]
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    words = mgpu_utils.bitcast(values, ir.VectorType.get((size // 4,), i32))
    signs, exponent = (mgpu.c(constant, i32) for constant in (-0x7F7F7F80, 0x4B000000))
    offset = mgpu.c(-(2.0**23 + 128), f32)
    wide = llvm.mlir_undef(ir.VectorType.get((size,), f32))
    for i in range(size):
        word = _extract(words, i // 4)
        # Bytes of the result: one of the word, two zeros, and the exponent's.
        bits = llvm.inline_asm(
            i32,
            [arith.xori(word, signs), exponent],
            f"prmt.b32 $0, $1, $2, {0x7440 | i % 4};",
            "=r,r,r",
            has_side_effects=False,
        )
        number = arith.addf(arith.bitcast(f32, bits), offset)
        wide = llvm.insertelement(wide, number, position=mgpu.c(i, i32))
    return wide
