"""Memory traffic of a compiled program: bytes read from and written to a device's HBM."""

from megalodon_jax.compiled.hlo import Computation, Instruction, Program, Shape
from megalodon_jax.compiled.kernels import KERNEL_TARGETS

# These move nothing and launch nothing; an asynchronous operation is counted at its start.
FREE_OPCODES = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
    "copy-done", "async-done", "async-update", "slice-done", "add-dependency",
}  # fmt: skip


def count_hbm_bytes(program: Program) -> int:
    """Bytes that one run reads from and writes to a device's HBM; caches are not modelled.

    Counts operands and results of all instructions outside fusions, times their executions. A slice
    counts its result, an update in place its update, and arrays in a TPU core's own memory (layout
    S(1)) count nothing. Padding of layouts is ignored.
    """
    fused = fused_computations(program)
    return sum(
        count * _traffic(instruction, computation, program)
        for instruction, computation, name, count in program.executed()
        if name not in fused
    )


def fused_computations(program: Program) -> set[str]:
    """Computations inside a fusion, directly or inside a fusion of a fusion."""
    fused: set[str] = set()
    for name, computation in reversed(program.computations.items()):
        for instruction in computation.values():
            callee = instruction.called("calls")
            if callee and (instruction.opcode == "fusion" or name in fused):
                fused.add(callee)
    return fused


def _traffic(instruction: Instruction, computation: Computation, program: Program) -> int:
    opcode = instruction.opcode
    if opcode in FREE_OPCODES:
        return 0
    if opcode == "fusion":
        return _fusion_traffic(instruction, computation, program)
    results = [_in_hbm(shape) for shape in instruction.shapes]
    operands = [sum(map(_in_hbm, computation[name].shapes)) for name in instruction.operands]
    if opcode in ("dynamic-slice", "slice", "gather"):
        return sum(results) + min(operands[0], sum(map(_bytes, instruction.shapes)))
    if opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if opcode == "custom-call":
        known = [*KERNEL_TARGETS, "__cublas"]
        return sum(results + operands) if any(t in instruction.attributes for t in known) else 0
    if opcode == "copy-start":
        return results[0] + sum(operands)
    if opcode.endswith("-start"):
        return sum(operands)
    if opcode.endswith("-done"):
        return sum(results)
    return sum(results + operands)


def _fusion_traffic(fusion: Instruction, computation: Computation, program: Program) -> int:
    body = program.computations[fusion.called("calls") or ""]
    total = 0
    for index, name in enumerate(fusion.operands):
        space_bytes = sum(map(_in_hbm, computation[name].shapes))
        total += min(space_bytes, _bytes_read(body, index, program)) if space_bytes else 0
    root = next(instruction for instruction in body.values() if instruction.is_root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(fusion.shapes):
        return total + sum(map(_in_hbm, fusion.shapes))
    for result, shape in zip(results, fusion.shapes, strict=True):
        while result.opcode in ("bitcast", "copy"):
            result = body[result.operands[0]]
        if result.opcode == "dynamic-update-slice" and _in_hbm(shape):
            total += sum(map(_bytes, body[result.operands[1]].shapes))
        else:
            total += _in_hbm(shape)
    return total


def _bytes_read(body: Computation, index: int, program: Program) -> int:
    """Bytes of parameter `index` that a fused computation reads."""
    parameters = [value for value in body.values() if value.opcode == "parameter"]
    return _read_by_users(parameters[index], body, program)


def _read_by_users(value: Instruction, body: Computation, program: Program) -> int:
    whole = sum(map(_bytes, value.shapes))
    total = 0
    for user in body.values():
        for index, name in enumerate(user.operands):
            if name != value.name:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather") and index == 0:
                total += sum(map(_bytes, user.shapes))
            elif user.opcode == "bitcast":
                total += _read_by_users(user, body, program)
            elif user.opcode == "fusion":
                inner = program.computations[user.called("calls") or ""]
                total += _bytes_read(inner, index, program)
            elif user.opcode != "dynamic-update-slice" or index == 1:
                total += whole
    return min(total, whole)


def _bytes(shape: Shape) -> int:
    return shape.bytes


def _in_hbm(shape: Shape) -> int:
    return shape.bytes if shape.space == 0 else 0
