"""Programs that update a donated array in place, in the carry of a loop."""

import math
from collections.abc import Iterable
from typing import Any

import jax

from megalodon_jax.compiled.hlo import Instruction, Program, parse_program
from megalodon_jax.compiled.memory import read_memory

# These pass arrays on.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}
_IN_PLACE = {"scatter", "dynamic-update-slice"}


def copies_of(compiled: jax.stages.Compiled, shapes: Iterable[tuple[int, ...]]) -> list[str]:
    """Instructions that write a whole array of one of the shapes, in any order of its axes."""
    program = parse_program(compiled.as_text() or "")
    sizes = {math.prod(shape) for shape in shapes}
    fused = {
        callee
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "fusion" and (callee := instruction.called("calls"))
    }
    return [
        f"{instruction.opcode} {instruction.name}"
        for name, computation in program.computations.items()
        if name not in fused and program.counts.get(name)
        for instruction in computation.values()
        if any(shape.size in sizes for shape in instruction.shapes)
        and not _is_in_place(instruction, program)
    ]


def _is_in_place(instruction: Instruction, program: Program) -> bool:
    if instruction.opcode in _FREE | _IN_PLACE:
        return True
    if instruction.opcode == "custom-call":
        return "output_to_operand_aliasing" in instruction.attributes
    if instruction.opcode != "fusion":
        return False
    fused = program.computations[instruction.called("calls") or ""]
    return any(fused_instruction.opcode in _IN_PLACE for fused_instruction in fused.values())


def temporary_share(compiled: jax.stages.Compiled, donated: Any) -> float:
    """Temporaries and results outside of donated arrays, over the bytes of the donated ones."""
    memory = read_memory(compiled)
    assert memory is not None
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(donated))
    return (memory.temporaries + memory.outputs) / size
