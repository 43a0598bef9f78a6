"""Kernels in a compiled program, and the TPU compiler's cycle estimates."""

import re
from typing import NamedTuple

from megalodon_jax.compiled.hlo import Instruction, Program, Shape

# Custom call targets of Pallas's two backends, of jax-triton's versions, of cuDNN's attention.
KERNEL_TARGETS = {
    "tpu_custom_call": "pallas_tpu",
    "mosaic_gpu_v2": "mosaic_gpu",
    "triton_kernel_call": "triton",
    "triton_kernel_call_ffi": "triton",
    "__cudnn$fmhaSoftmax": "cudnn",
    "__cudnn$fmhaSoftmaxBackward": "cudnn",
}
# Operations of `pallas_kernels`; the names of their kernels begin with them.
KERNEL_OPERATIONS = ("cema", "timestep_norm", "chunk_attention", "rowwise")


class CompiledKernel(NamedTuple):
    """A hand-written kernel in a program.

    Attributes:
      name: such as "cema_forward".
      operation: the operation of `pallas_kernels` it belongs to, "attention" for a Transformer's,
        or "other".
      implementation: "pallas_tpu", "mosaic_gpu", "triton", "cudnn" or "splash".
      count: executions in one run of the program.
      flops: of one execution, from the kernel's cost estimate; 0 if it states none.
      results: shapes of its results.
    """

    name: str
    operation: str
    implementation: str
    count: int
    flops: int
    results: tuple[Shape, ...]


def find_kernels(program: Program) -> list[CompiledKernel]:
    """The hand-written kernels that one run of a program executes, one entry for each call."""
    found = []
    for instruction, _, _, count in program.executed():
        target = _kernel_target(instruction)
        if target is None:
            continue
        name = _kernel_name(instruction, target)
        stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
        flops = int(stated[1]) if stated else 0
        implementation, operation = KERNEL_TARGETS[target], kernel_operation(name)
        if name.startswith("splash"):
            implementation, operation = "splash", "attention"
        elif implementation == "cudnn":
            operation = "attention"
        found.append(
            CompiledKernel(name, operation, implementation, count, flops, instruction.shapes)
        )
    return found


def _kernel_name(instruction: Instruction, target: str) -> str:
    if KERNEL_TARGETS[target] == "cudnn":
        return "cudnn_attention_backward" if "Backward" in target else "cudnn_attention_forward"
    path = instruction.op_name.split("/")
    splash = next((part for part in path if part.startswith("splash")), None)
    # Differentiation wraps the scope of a Triton kernel: "transpose(jvp(cema_summaries))".
    return splash or (re.sub(r".*\(|\)", "", path[-2]) if len(path) > 1 else instruction.name)


def kernel_operation(name: str) -> str:
    """The operation of `pallas_kernels` that a kernel belongs to by its name, or "other"."""
    return next(
        (operation for operation in KERNEL_OPERATIONS if name.startswith(operation)), "other"
    )


def count_estimated_cycles(program: Program) -> int:
    """Cycles that the TPU compiler expects of XLA's own operations, loops counted fully.

    Kernels and waiting are not included. 0 where a compiler states no cycles, as for GPUs.
    """
    cycles = 0
    for instruction, _, _, count in program.executed():
        own = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        if own and instruction.opcode != "custom-call":
            cycles += count * int(own[1])
    return cycles


def _kernel_target(instruction: Instruction) -> str | None:
    if instruction.opcode != "custom-call":
        return None
    target = re.search(r'custom_call_target="([\w$]+)"', instruction.attributes)
    return target[1] if target and target[1] in KERNEL_TARGETS else None
