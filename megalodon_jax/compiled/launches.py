"""Kernels that one iteration of a compiled program's outer loop launches."""

from megalodon_jax.compiled.hlo import Program
from megalodon_jax.compiled.memory_traffic import FREE_OPCODES, fused_computations


def count_launches(program: Program, *, iterations: int = 1) -> int:
    """Instructions that a GPU runs as a kernel or a copy, in one iteration.

    Fusions, custom calls, copies and everything else that computes or moves data outside a fusion
    count, times their executions. A call of a library may launch more than one kernel. A loop
    without a constant number of iterations counts as one.

    Args:
      program: the program.
      iterations: of the program's outer loop, such as the steps of a decoding block; what runs less
        often, before and after the loop, does not count.
    """
    fused = fused_computations(program)
    return sum(
        count // iterations
        for instruction, _, name, count in program.executed()
        if name not in fused and instruction.opcode not in FREE_OPCODES
    )
